"""Rounds sampled by a server: it has the weights of the round, or the run says that it hasn't.

The server is a stand-in: HTTP in the process of the test, the checkpoint handed over, and our own ``generate``.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from http_stand_in import StandIn

from lab_utils.data.tokenizer import load_tokenizer
from lab_utils.models.generate import Request, Sampling, generate
from lab_utils.models.load import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from feed_jobs import lines, worked
from small_v4 import write_source

pytestmark = pytest.mark.slow
TOKENIZER = load_tokenizer()
EOS = TOKENIZER.eos_id
GAP = "train/sampling/sampling_logp_difference/mean"


class ModelServer(StandIn):
    """Answers of a model as vLLM gives them.

    Args:
        source: weights that it has at first.
        deaf: it says that it takes new weights, and doesn't.
        by_name: it answers with the weights that a request names as its model, and has no URL to reload by.
    """

    def __init__(self, source: str, *, deaf: bool = False, by_name: bool = False) -> None:
        self.deaf, self.by_name, self.lock = deaf, by_name, threading.Lock()
        self.source = source
        self.taken: list[str] = []  # folders whose weights answered, by their first answers
        self._load(source)
        super().__init__(self.answer)

    def _load(self, source: str) -> None:
        self.source, self.model = source, load_model(source, dtype=torch.float32).eval()

    def answer(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        with self.lock:
            if path == "/v1/models":
                return 200, {"data": [{"id": self.source}]}
            if path == "/reload":
                if not self.deaf:
                    self._load(body["path"])
                return 200, {}
            if self.by_name and body["model"] != self.source:
                self._load(body["model"])
            return 200, self._completion(body)

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = TOKENIZER.encode(prompt)
        elif not self.taken or self.taken[-1] != self.source:
            self.taken.append(self.source)
        sampling = Sampling(body.get("temperature", 1.0), body.get("top_p", 1.0), 0, body.get("seed", 0))
        (sample,) = generate(
            self.model, [Request(prompt, 0, body["max_tokens"])], sampling=sampling, eos_id=EOS
        )
        choice = {
            "text": TOKENIZER.decode(sample.tokens),
            "finish_reason": "stop" if sample.finished else "length",
            "token_ids": sample.tokens,
            "logprobs": {"token_logprobs": sample.logprobs},
        }
        return {"choices": [choice]}


def tree(source: str, server: ModelServer, steps: int = 2, **rollout: Any) -> dict[str, Any]:
    """Every answer has the same reward, and it counts: without a baseline the weights move far in one step."""
    rewards = [{"name": "length", "options": {"longest": 6, "margin": 6}}]
    return {
        "model": {"source": source},
        "objective": {
            "kind": "grpo",
            "baseline": "none",
            "scale": "none",
            "drop_uniform_groups": False,
            "rewards": rewards,
        },
        "rollout": {
            "source": "server",
            "server": f"{server.url}/v1",
            "prompts": 2,
            "group_size": 2,
            "max_new_tokens": 6,
            "gap_alarm": 0.02,
            **rollout,
        },
        "data": {
            "train": [{"manifest": "ascent-tasks-prompts", "split": "validation"}],
            "row_tokens": 384,
        },
        "optim": {"lr": 0.1},
        "schedule": {"steps": steps, "batch_tokens": 768, "warmup_steps": 0, "shape": "constant"},
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, Any]:
    """Runs and their servers: one that reloads, one that doesn't, one that loads what requests name."""
    root = tmp_path_factory.mktemp("served")
    source = write_source(root / "small")
    servers = {
        "told": ModelServer(source),
        "deaf": ModelServer(source, deaf=True),
        "named": ModelServer(source, by_name=True),
        "stages": ModelServer(source),
    }
    reload = {name: {"reload": f"{server.url}/reload"} for name, server in servers.items()}
    alone = {
        "told": tree(source, servers["told"], **reload["told"]),
        "deaf": tree(source, servers["deaf"], **reload["deaf"]),
        "named": tree(source, servers["named"], steps=1, reload_every=2),
        # A round in which nothing is handed over, but by another process than the one before.
        "later=named": tree(source, servers["named"], steps=2, reload_every=2),
    }
    runs = worked(root / "one", alone)
    stages = tree(source, servers["stages"], steps=1, **reload["stages"])
    runs |= worked(root / "two", {"stages": {**stages, "parallel": {"pp": 2}}}, ranks=2)
    yield {"runs": runs, "servers": servers}
    for server in servers.values():
        server.close()


def gaps(run: Any) -> list[float]:
    return [row[GAP] for row in lines(run) if GAP in row]


def alarms(run: Any) -> list[str]:
    return [row["message"] for row in run.rows("events.jsonl") if row["kind"] == "sampler_gap"]


def checkpoints(run: Any, *steps: int) -> list[str]:
    return [str(run.path / "checkpoints" / f"step-{step:06d}" / "model") for step in steps]


def test_each_round_is_sampled_by_the_weights_that_learn_from_it(served):
    run, server = served["runs"]["told"], served["servers"]["told"]
    assert server.taken == checkpoints(run, 0, 1)
    assert len(gaps(run)) == 2 and max(gaps(run)) < 1e-4 and not alarms(run)
    assert all(row["perf/time/weight_sync"] > 0 for row in lines(run) if GAP in row)


def test_a_server_that_keeps_its_old_weights_raises_the_alarm(served):
    run, server = served["runs"]["deaf"], served["servers"]["deaf"]
    first, second = gaps(run)
    assert len(server.taken) == 1 and first < 1e-4 and second > 0.05
    (said,) = alarms(run)
    assert "stale weights" in said


def test_a_resumed_run_hands_over_in_its_first_round_whatever_the_interval(served):
    run, server = served["runs"]["later"], served["servers"]["named"]
    assert server.taken == [*checkpoints(served["runs"]["named"], 0), *checkpoints(run, 1)]
    assert len(gaps(run)) == 2 and max(gaps(run)) < 1e-4 and not alarms(run)


def test_the_stages_of_a_pipeline_learn_from_the_same_samples(served):
    run, server = served["runs"]["stages"], served["servers"]["stages"]
    asked = [body["seed"] for _, path, body, _ in server.asked if path == "/v1/completions"]
    assert len(asked) == len(set(asked)) == 4, "each answer is asked for once"
    assert len(gaps(run)) == 1 and max(gaps(run)) < 1e-4
