"""A run killed while it samples goes on with the same samples: what was in the log is not sampled again."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import torch
from feed_jobs import begun, weights, worked

pytestmark = pytest.mark.slow
TREE = {
    "objective": {
        "kind": "grpo",
        "rewards": [{"name": "length", "options": {"longest": 200, "margin": 150}}],
        "baseline": "none",
        "scale": "none",
        "drop_uniform_groups": False,
    },
    "rollout": {"prompts": 4, "group_size": 2, "max_new_tokens": 200},
    "data": {"train": [{"manifest": "ascent-tasks-prompts", "split": "validation"}], "row_tokens": 512},
    "schedule": {"steps": 2, "batch_tokens": 2048, "warmup_steps": 0, "shape": "constant"},
    "optim": {"lr": 1e-4, "eps": 1e-6},
}


def killed_in(root: Path, name: str, log: str) -> bytes:
    """Start a run, kill all of it as soon as a round's log holds some tokens; what the log then has."""
    process = begun(root, {name: TREE})
    path, end = root / name / "rollouts" / log, time.monotonic() + 240
    try:
        while not (path.exists() and path.stat().st_size > 2000):
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < end, "the round did not begin in time"
            time.sleep(0.005)
    finally:
        everyone = psutil.Process(process.pid)
        for each in [everyone, *everyone.children(recursive=True)]:
            each.kill()
        process.wait()
    return path.read_bytes()


def test_a_run_killed_while_it_samples_goes_on_with_the_same_samples(tmp_path):
    log = "round-000001.rank-0.log"
    before = killed_in(tmp_path, "killed", log)
    rounds = tmp_path / "killed" / "rollouts"
    assert not list(rounds.glob("round-000001.*.pt")), "the round was over: nothing was cut short"
    first = next(rounds.glob("round-000000.*.pt")).read_bytes()
    runs = worked(tmp_path, {"killed": TREE, "whole": TREE})
    logs = {name: (run.path / "rollouts" / log).read_bytes() for name, run in runs.items()}
    assert logs["killed"].startswith(before), "what the log held stays as it was"
    assert next(rounds.glob("round-000000.*.pt")).read_bytes() == first, "a round that was over is read"
    rows = [
        torch.load(next((run.path / "rollouts").glob("round-000001.*.pt")))["rows"] for run in runs.values()
    ]
    assert torch.equal(rows[0][0]["input_ids"], rows[1][0]["input_ids"])
    found, expected = (weights(run) for run in runs.values())
    for name, tensor in expected.items():
        assert torch.allclose(found[name].float(), tensor.float(), rtol=1e-4, atol=1e-6), name
