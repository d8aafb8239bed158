"""Whoever samples and learns together, samples and losses are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from feed_jobs import few, lines, weights, worked

from lab_utils.runs.directory import RunDirectory

pytestmark = pytest.mark.slow
# ε keeps Adam from making rounding errors of gradients near zero as large as any other step, and so weights alike: a
# token that is drawn otherwise would be another sample.
COMMON: dict[str, Any] = {
    "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 12},
    "data": {"train": [{"manifest": "ascent-tasks-prompts", "split": "validation"}], "row_tokens": 384},
    "schedule": {"steps": 4, "batch_tokens": 1536, "warmup_steps": 0, "shape": "constant"},
    "optim": {"lr": 1e-4, "eps": 1e-5},
}
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {
        **COMMON,
        "objective": {
            "kind": "grpo",
            "rewards": [{"name": "length", "options": {"longest": 12, "margin": 10}}],
            "updates_per_rollout": 2,
            "kl_weight": 0.05,
            "keep_routing": True,
            # Every answer counts, those that were cut as well.
            "baseline": "none",
            "scale": "none",
            "drop_uniform_groups": False,
        },
    },
    "distill": {
        **COMMON,
        "schedule": {**COMMON["schedule"], "steps": 3},
        "objective": {"kind": "distill", "teachers": [{"source": "preset:tiny"}]},
    },
}
LAYOUTS = {"ep2_pp2": {"ep": 2, "pp": 2}, "pp2_v2": {"pp": 2, "virtual_stages": 2}}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def runs(root) -> dict[str, dict[str, Any]]:
    """The recipes, with a few held-out questions that are answered at the end."""
    (root / "data").mkdir()
    data = {**COMMON["data"], "validation": [few(root / "data", "ascent-tasks-prompts", 6)]}
    return {
        name: {
            **tree,
            "data": data,
            "schedule": {**tree["schedule"], "eval_every": tree["schedule"]["steps"]},
        }
        for name, tree in RUNS.items()
    }


@pytest.fixture(scope="module")
def one_rank(root, runs) -> dict[str, RunDirectory]:
    return worked(root / "one", runs)


@pytest.fixture(scope="module")
def four_ranks(root, runs) -> dict[str, RunDirectory]:
    """Every run under every layout, in one launch."""
    trees = {
        f"{name}-{layout}": {**tree, "parallel": parallel}
        for layout, parallel in LAYOUTS.items()
        for name, tree in runs.items()
    }
    return worked(root / "four", trees, ranks=4)


def curve(run: RunDirectory, name: str) -> torch.Tensor:
    return torch.tensor([line[name] for line in lines(run) if name in line])


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounds_under_a_layout_follow_one_rank(one_rank, four_ranks, layout, name):
    one, run = one_rank[name], four_ranks[f"{name}-{layout}"]
    for metric in ("train/loss", "train/completions/mean_length"):
        expected, found = curve(one, metric), curve(run, metric)
        assert len(found) == len(expected) > 1
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6), (metric, found, expected)
    for metric in ("eval/exact_match", "eval/completions/mean_length"):
        assert torch.equal(curve(run, metric), curve(one, metric)) and len(curve(one, metric))
    expected, found = weights(one), weights(run)
    distance, size = (
        torch.stack([each.float().norm() for each in tensors]).norm()
        for tensors in ([found[name] - tensor for name, tensor in expected.items()], expected.values())
    )
    assert distance <= 1e-4 * size
