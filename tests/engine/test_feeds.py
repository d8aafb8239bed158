"""Rounds of samples in a real run: they teach something, and a round that was cut short is gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lab_utils.errors import LabError
from lab_utils.recipe import Recipe
from lab_utils.runs.checks import preflight
from lab_utils.runs.directory import RunDirectory, create
from lab_utils.telemetry.names import lookup

pytestmark = pytest.mark.slow
BASE: dict[str, Any] = {
    "name": "feeds",
    "model": {"source": "base:tiny"},
    "optim": {"lr": 3e-4},
    "tracking": {"wandb": "disabled"},
    "cluster": {"nproc": 1, "threads": 1, "accelerator": "cpu"},
}
# The base model seldom ends an answer: a reward for ending one differs within most groups.
GRPO: dict[str, Any] = {
    "objective": {"kind": "grpo", "rewards": [{"name": "length", "options": {"longest": 16, "margin": 12}}]},
    "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 16},
    "data": {"train": [{"manifest": "ascent-tasks-prompts", "split": "validation"}], "row_tokens": 384},
    "schedule": {"steps": 4, "batch_tokens": 1536, "warmup_steps": 0, "shape": "constant"},
}


def work(run: RunDirectory, ranks: int = 1) -> None:
    """The run's job, to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", "lab_utils.engine.worker", str(run.path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (run.status or {}).get("error", "") + done.stderr[-3000:]


def trained(tree: dict[str, Any], root: Path, ranks: int = 1) -> RunDirectory:
    run = create(Recipe.parse({**BASE, **tree}).with_changes({"cluster.nproc": ranks}), root)
    work(run, ranks)
    return run


def lines(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in (run.checkpoints()[-1] / "model").glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_grpo_moves_weights_and_says_nothing_undefined(tmp_path):
    run = trained(GRPO, tmp_path)
    rows = lines(run)
    undefined = {key for row in rows for key in row if "/" in key and lookup(key) is None}
    assert not undefined
    steps = [row for row in rows if "train/reward" in row]
    assert len(steps) == 4 and any(row["train/reward_std"] > 0 for row in steps)
    assert any(row["train/grad_norm"] > 0 for row in steps)
    gap = "train/sampling/sampling_logp_difference/max"
    assert max(row[gap] for row in steps if gap in row) < 1e-3
    before = load_file(next((Path("lab_utils/models/shipped/tiny")).glob("*.safetensors")))
    moved = [name for name, tensor in weights(run).items() if not torch.equal(tensor, before[name].float())]
    assert len(moved) > 100


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_stopped_within_a_round_goes_on_with_the_same_samples(tmp_path, ranks):
    tree = {**GRPO, "objective": {**GRPO["objective"], "updates_per_rollout": 2}}
    whole = trained(tree, tmp_path / "whole")
    # Half of it, by one rank: the checkpoint of step 1 lies between the two updates of a round.
    halves = create(
        Recipe.parse({**BASE, **tree}).with_changes({"schedule.save_every": 1}), tmp_path / "halves"
    )
    one = halves.recipe.with_changes({"schedule.steps": 1})
    halves.replace_recipe(one)
    work(halves)
    logs = {path.name: path.stat().st_size for path in (halves.path / "rollouts").glob("*.log")}
    halves.replace_recipe(halves.recipe.with_changes({"schedule.steps": 4, "cluster.nproc": ranks}))
    work(halves, ranks)
    # Nothing more was sampled of that round.
    for name, size in logs.items():
        path = halves.path / "rollouts" / name
        assert not path.exists() or path.stat().st_size == size
    expected, found = weights(whole), weights(halves)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-6)
            assert error < 1e-4, (name, float(error))


def test_distillation_draws_nearer_to_its_teacher(tmp_path):
    """The teacher is the student after some fine-tuning; on samples and on given texts their divergence falls."""
    texts = {"train": [{"manifest": "ascent-tasks-sft", "split": "validation"}], "row_tokens": 512}
    schedule = {"batch_tokens": 2048, "warmup_steps": 0, "shape": "constant"}
    plain = {"data": texts, "schedule": {**schedule, "steps": 12}, "optim": {"lr": 1e-3}}
    teacher = trained(plain, tmp_path / "teacher", ranks=2)
    source = {"source": str(teacher.checkpoints()[-1] / "model")}
    on_policy = {
        "objective": {"kind": "distill", "teachers": [source]},
        "rollout": {"prompts": 16, "group_size": 4, "max_new_tokens": 16},
        "data": {**GRPO["data"], "row_tokens": 512},
        "schedule": {**schedule, "steps": 14},
    }
    off_policy = {
        "objective": {"kind": "distill", "teachers": [source], "on_policy": False},
        "schedule": {**schedule, "steps": 6},
    }
    for name, changes, factor in (("on", on_policy, 0.75), ("off", off_policy, 0.5)):
        student = trained({**plain, **changes}, tmp_path / name, ranks=2)
        divergence = [row["train/teacher_kl"] for row in lines(student) if "train/teacher_kl" in row]
        assert sum(divergence[-3:]) < factor * sum(divergence[:3]), (name, divergence)


PAIRS = {"train": [{"manifest": "ascent-tasks-preference", "split": "validation"}], "row_tokens": 1024}
TEXTS = {"train": [{"manifest": "ascent-tasks-sft", "split": "validation"}], "row_tokens": 512}
LAYOUT_FREE = {
    "kto": {"objective": {"kind": "preference", "loss": "kto", "reference": "live"}, "data": PAIRS},
    "distill": {
        "objective": {"kind": "distill", "teachers": [{"source": "preset:tiny"}], "on_policy": False},
        "data": TEXTS,
    },
}


@pytest.mark.parametrize("kind", LAYOUT_FREE)
def test_an_objective_gives_the_same_losses_under_expert_and_pipeline_parallelism(tmp_path, kind):
    """A live reference, the look at a whole batch that kto takes, and a teacher go through the stages too."""
    tree = {**LAYOUT_FREE[kind], "optim": {"lr": 1e-4}}
    tree["schedule"] = {"steps": 3, "batch_tokens": 4096, "warmup_steps": 0}
    whole = trained(tree, tmp_path / "one")
    cut = trained({**tree, "parallel": {"ep": 2, "pp": 2}}, tmp_path / "four", ranks=4)
    expected, found = (
        [row["train/loss"] for row in lines(run) if "train/loss" in row] for run in (whole, cut)
    )
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout.prompts": 3, "cluster.nproc": 2}, "rollout.prompts=3 cannot be shared evenly by 2"),
        ({"parallel.pp": 2, "cluster.nproc": 2}, "parallel.pp is 2"),
        ({"objective.rewards.0.options": {"longst": 3}}, "did you mean 'longest'"),
        ({"objective.rewards.0.name": "exat"}, "did you mean 'exact'"),
    ],
)
def test_rollouts_that_cannot_be_are_refused_before_a_start(tmp_path, changes, says):
    recipe = Recipe.parse({**BASE, **GRPO}).with_changes(changes)
    with pytest.raises(LabError, match=says):
        preflight(recipe, tmp_path)
