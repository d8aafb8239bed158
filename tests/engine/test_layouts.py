"""A layout changes speed, not loss: real ranks beside one process, by the command that users run on their clusters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lab_utils.bench.layouts import bench_layout, chosen_layouts, verify_layouts
from lab_utils.errors import LayoutError
from lab_utils.planner.layouts import layout_names
from lab_utils.recipe import Recipe
from lab_utils.runs.checks import preflight

pytestmark = pytest.mark.slow  # real processes: minutes

TWO = ["dp2_ep2_pp1", "dp1_ep1_pp2_v2"]
FOUR = ["dp4_ep4_pp1", "dp2_ep2_pp2", "dp1_ep1_pp4", "dp1_cp4_ep1_pp1", "dp1_cp2_ep2_pp2_v2"]


def check(rows: list[dict], layouts: list[str], optimizers: list[str]) -> None:
    assert [(row["optimizer"], row["layout"]) for row in rows] == [
        (o, n) for o in optimizers for n in layouts
    ]
    for row in rows:
        assert row["ok"], row
        assert row["max_loss_error"] <= 2e-5 and row["max_parameter_error"] <= 1e-4, row
        assert row["max_gradient_error"] <= 1e-4, row
        assert row["changed"] == row["tensors"] > 200, row


def test_two_ranks_by_the_command_itself() -> None:
    command = [sys.executable, "-m", "lab_utils.cli", "verify", "layouts", "--nproc", "2", "--json"]
    done = subprocess.run([*command, "--layouts", ",".join(TWO)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    check(json.loads(done.stdout), TWO, ["adamw", "muon"])


@pytest.mark.timeout(900)
def test_four_ranks() -> None:
    check(verify_layouts(4, layouts=FOUR, optimizers=["adamw", "muon"]), FOUR, ["adamw", "muon"])


@pytest.mark.timeout(900)
def test_eight_ranks_with_everything_at_once() -> None:
    layouts = ["dp4_ep2_pp2_v2"]
    check(verify_layouts(8, layouts=layouts, optimizers=["muon"]), layouts, ["muon"])


def test_bf16_stays_within_a_percent() -> None:
    (row,) = verify_layouts(2, layouts=["dp1_ep1_pp2"], optimizers=["muon"], dtype="bfloat16", steps=10)
    assert row["ok"] and row["max_loss_error"] <= 1e-2, row


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.offload": True, "model.checkpointing": "mhc"},
        {"parallel.zero": 0, "model.checkpointing": "full"},
    ],
    ids=str,
)
def test_what_saves_memory_changes_no_loss(changes: dict) -> None:
    rows = verify_layouts(2, layouts=["dp2_ep2_pp1"], optimizers=["muon"], steps=6, changes=changes)
    check(rows, ["dp2_ep2_pp1"], ["muon"])


def test_muon_over_a_part_of_the_ranks_and_repeated_beyond_is_the_same() -> None:
    worker = str(Path(__file__).parent / "limited_group.py")
    layouts = ["dp4_ep1_pp1", "dp4_ep2_pp1"]
    rows = verify_layouts(4, layouts=layouts, optimizers=["muon"], steps=8, worker=worker)
    check(rows, layouts, ["muon"])


def test_a_planted_error_is_found() -> None:
    """The experts' balance weighs a hundredth more on one side: the matrix must see it."""
    planted = {"model.balance_loss": 0.0101}
    (row,) = verify_layouts(2, layouts=["dp2_ep1_pp1"], optimizers=["adamw"], steps=3, planted=planted)
    assert not row["ok"] and row["max_gradient_error"] > 1e-4, row


def test_the_bench_tells_speed_traffic_and_memory() -> None:
    layouts = ["dp2_ep1_pp1", "dp2_ep2_pp1"]
    rows = bench_layout(2, layouts=layouts, rows=4, row_tokens=64, steps=1, follow=True)
    assert [row["layout"] for row in rows] == ["dp2_ep1_pp1", "dp2_ep2_pp1"]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["bytes_sent_per_rank"] > 1e5 and row["peak_mib"] > 100
        # The process holds Python and torch besides its tensors: weights, gradients, moments and what a step keeps.
        assert 30 < row["tensors_mib"] < row["peak_mib"] - 0.8 * row["resident_mib"]
    # Experts of one rank each are neither summed nor gathered; their tokens travel instead.
    assert rows[1]["bytes_sent_per_rank"] != rows[0]["bytes_sent_per_rank"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"parallel.pp": 8}, "8 stages, but the model has 4 layers: use at most 4"),
        ({"parallel.pp": 2, "parallel.virtual_stages": 4}, "8 stages, but the model has 4 layers"),
        ({"parallel.ep": 3, "cluster.nproc": 3}, "parallel.ep=3 does not divide the model's 16 experts"),
        ({"parallel.ep": 3, "cluster.nproc": 2}, "parallel.ep=3 does not divide the 2 data-parallel ranks"),
        ({"parallel.virtual_stages": 2}, "needs a pipeline: set parallel.pp to 2 or more"),
        ({"parallel.cp": 3}, "parallel.cp=3 does not divide the 8 ranks of a stage"),
        ({"parallel.cp": 8, "data.row_tokens": 500}, "parallel.cp=8 does not divide data.row_tokens=500"),
        (
            {"parallel.cp": 8, "data.row_tokens": 256},
            "parallel.cp=8 cuts rows of 256 tokens into runs of 32, and attention needs the 64 tokens before a run: "
            "set parallel.cp to at most 4",
        ),
        ({"parallel.pp": 2, "schedule.micro_rows": 24}, "at least 2 micro-batches a rank"),
    ],
)
def test_what_does_not_fit_is_said_before_a_run_starts(changes: dict, said: str, tmp_path: Path) -> None:
    base = {"cluster.nproc": 8, "data.row_tokens": 512, "schedule.batch_tokens": 24 * 512 * 4}
    recipe = Recipe.load("sft_tiny").with_changes({**base, **changes})
    with pytest.raises(LayoutError, match=re.escape(said)):
        preflight(recipe, tmp_path)


def test_layouts_are_those_that_divide() -> None:
    names = layout_names(8)
    assert len([name for name in names if "_cp" not in name]) == 13
    assert {"dp8_ep4_pp1", "dp2_ep2_pp4_v2", "dp4_cp2_ep1_pp1", "dp1_cp4_ep2_pp2_v2"} < set(names)
    assert "dp2_ep4_pp4" not in names
    with pytest.raises(LayoutError, match="no layout of 8 ranks; did you mean 'dp"):
        chosen_layouts(8, ["dp4_ep2_pp3"])
