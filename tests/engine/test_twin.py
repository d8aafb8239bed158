"""The twin against ranks that are there, on a small model: bytes, calls, and memory over time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab_utils.engine.twin.collectives import check, from_json
from lab_utils.launchers._forked import command

HERE = Path(__file__).with_name("twin_trials.py")
ROOT = HERE.parents[2]
TREE: dict[str, Any] = {
    "name": "twin",
    "model": {"source": "preset:tiny", "dtype": "bfloat16", "mtp_loss": 0.1, "balance_loss": 1e-4},
    "data": {"train": [{"manifest": "none"}], "row_tokens": 128},
    "schedule": {"batch_tokens": 128 * 2 * 6, "micro_rows": 1},
    "parallel": {"ep": 2, "pp": 2},
    "tracking": {"wandb": "disabled"},
}


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    return {
        key: {**value, **sections.get(key, {})} if isinstance(value, dict) else value
        for key, value in TREE.items()
    }


FULL = changed(model={"checkpointing": "full"})
ALONE = changed(parallel={"ep": 1, "pp": 1}, schedule={"batch_tokens": 128, "micro_rows": 1})
MUON = {**FULL, "optim": {"kind": "muon"}}
CUT = changed(model={"checkpointing": "full"}, parallel={"cp": 2, "ep": 2, "pp": 2})
CASES: dict[str, dict[str, Any]] = {
    **{f"cpu-{rank}": {"recipe": FULL, "ranks": 4, "rank": rank, "device": "cpu"} for rank in range(4)},
    **{f"npu-{rank}": {"recipe": FULL, "ranks": 8, "rank": rank, "device": "npu"} for rank in (0, 1, 2, 3)},
    **{f"cut-{rank}": {"recipe": CUT, "ranks": 4, "rank": rank, "device": "cpu"} for rank in range(4)},
    "every": {"recipe": FULL, "ranks": 8, "rank": 0, "device": "npu", "replay": False},
    "plain": {"recipe": TREE, "ranks": 8, "rank": 2, "device": "npu"},
    "plain-every": {"recipe": TREE, "ranks": 8, "rank": 2, "device": "npu", "replay": False},
    **{f"muon-{rank}": {"recipe": MUON, "ranks": 8, "rank": rank, "device": "npu"} for rank in (0, 2)},
    "alone": {"recipe": ALONE, "ranks": 1, "rank": 0, "device": "cpu"},
    "few": {"recipe": changed(schedule={"batch_tokens": 128 * 2}), "ranks": 4, "rank": 0, "device": "cpu"},
}


def run(arguments: list[str]) -> None:
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("twins")
    (folder / "cases.json").write_text(json.dumps(CASES))
    run([sys.executable, str(HERE), "twins", str(folder)])
    return json.loads((folder / "twins.json").read_text())


@pytest.fixture(
    scope="module", params=[("cpu", FULL), ("cut", CUT)], ids=["whole rows", "rows cut over ranks"]
)
def present(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each of four real ranks, with the name of its twin."""
    name, recipe = request.param
    folder = tmp_path_factory.mktemp("present")
    (folder / "recipe.json").write_text(json.dumps(recipe))
    run(command(4, str(HERE), str(folder)))
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(4)]
    return [{**rank, "twin": f"{name}-{rank['rank']}"} for rank in ranks]


def summed(twin: dict[str, Any], what: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in twin["collectives"]:
        found[row["kind"]] = found.get(row["kind"], 0) + row[what]
    return found


@pytest.mark.slow
def test_the_state_is_that_of_real_ranks_to_the_byte(twins, present) -> None:
    for rank in present:
        state = twins[rank["twin"]]["state"]
        assert {kind: state[kind] for kind in rank["state"]} == rank["state"]


@pytest.mark.slow
def test_calls_and_bytes_are_those_of_real_ranks(twins, present) -> None:
    names = {"all_to_all": "all_to_all_single", "send": "batch_isend_irecv"}
    for rank in present:
        twin = twins[rank["twin"]]
        calls, sent = summed(twin, "count"), summed(twin, "sent")
        assert {kind: calls.get(kind, 0) for kind in rank["calls"]} == rank["calls"]
        for kind in ("all_reduce", "all_gather", "all_to_all"):
            # The counter drops the fraction of a byte of each call, in one sum or another.
            assert sent.get(kind, 0) == pytest.approx(
                rank["sent"].get(names.get(kind, kind), 0), abs=calls.get(kind, 0)
            )
        # Descriptions of the streams, pickled, go before the first of them.
        messages = rank["sent"]["batch_isend_irecv"] - sent["send"]
        assert 0 < messages < 10_000


@pytest.mark.slow
def test_the_peak_is_that_of_real_tensors_followed_the_same_way(twins, present) -> None:
    for rank in present:
        assert twins[rank["twin"]]["peak"] == pytest.approx(rank["peak"], rel=0.005)


@pytest.mark.slow
def test_activations_are_what_autograd_keeps(twins) -> None:
    """By autograd's own account; the twin also counts what it doesn't know of, as the places of documents."""
    assert twins["saved"] <= twins["alone"]["kept"] <= 1.05 * twins["saved"]


@pytest.mark.slow
@pytest.mark.parametrize("replayed, every", [("npu-0", "every"), ("plain", "plain-every")])
def test_a_replay_changes_nothing(twins, replayed: str, every: str) -> None:
    short, whole = twins[replayed], twins[every]
    assert short["peak"] == pytest.approx(whole["peak"], rel=1e-4)  # a loss's scalar stands here or there
    assert short["by_kind"] == pytest.approx(whole["by_kind"], rel=1e-3)
    assert short["order"] == whole["order"]
    assert short["flops"] == whole["flops"]
    assert short["operators"] < whole["operators"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        [f"npu-{r}" for r in range(4)],
        [f"cpu-{r}" for r in range(4)],
        [f"cut-{r}" for r in range(4)],
        ["muon-0", "muon-2"],
    ],
)
def test_ranks_ask_the_same_of_one_another(twins, names: list[str]) -> None:
    orders = {twins[name]["rank"]: from_json(twins[name]["order"]) for name in names}
    assert check(orders) == []


@pytest.mark.slow
def test_kinds_add_up_and_none_is_missing(twins) -> None:
    twin = twins["npu-0"]
    assert sum(twin["by_kind"].values()) == twin["peak"]
    assert all(twin["by_kind"][kind] > 0 for kind in ("weights", "gradients", "masters"))
    assert twin["kept"] > 0
    assert sum(twin["memory_by_kind_gib"].values()) == pytest.approx(twin["memory_peak_gib"])


@pytest.mark.slow
def test_flops_stand_beside_the_closed_form(twins) -> None:
    """Recomputation adds a third; attention works on whole blocks of keys, of which small models have many to mask."""
    full, plain = twins["every"], twins["plain-every"]
    assert 1.2 < full["flops"] / full["flops_model"] < 2.5
    assert 0.9 < plain["flops"] / plain["flops_model"] < 1.9


@pytest.mark.slow
def test_a_pipeline_without_enough_micro_batches_is_refused(twins) -> None:
    assert "at least 2 micro-batches" in twins["few"]["error"]


PRO: dict[str, Any] = {
    "name": "pro",
    "model": {"source": "preset:pro", "dtype": "bfloat16", "checkpointing": "full", "mtp_loss": 0.1},
    "data": {"train": [{"manifest": "none"}], "row_tokens": 4096},
    "schedule": {"batch_tokens": 4096 * 128 * 32, "micro_rows": 1},
    "parallel": {"ep": 64, "pp": 16},
    "tracking": {"wandb": "disabled"},
}


def lab_twin(folder: Path, recipe: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return subprocess.run(
        [sys.executable, "-m", "lab_utils.cli", "twin", str(path), *options, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    done = lab_twin(tmp_path, FULL, "--chips=4", "--device-gib=0.01")
    told = json.loads(done.stdout)
    assert done.returncode == 2
    assert told["fits"] is False and told["exceeds_gib"] > 0
    assert "0.01" in done.stderr and "model.checkpointing" in done.stderr


@pytest.mark.slow
def test_a_rank_of_two_thousand_runs_a_step_of_pro(tmp_path: Path) -> None:
    done = lab_twin(tmp_path, PRO, "--chips=1024", "--rank=500", "--tensors=5")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["fits"] and told["memory_peak_gib"] < 64
    assert told["ranks"] == 2048 and told["micro_batches"] == 32
    sizes = {row["group"]: row["group_size"] for row in told["collectives"]}
    assert (sizes["world"], sizes["data"], sizes["experts"], sizes["expert_data"]) == (2048, 128, 64, 2)
    forward = sum(row["count"] for row in told["collectives"] if row["kind"] == "all_to_all")
    layers = sum(stop - start for start, stop in told["layers"])
    # A layer's micro-batch: counts, rows and their weights out, rows back; the same again; gradients of all but counts.
    assert forward == layers * 32 * (4 + 4 + 3)
    assert abs(told["planner_error"]) < 0.03
    assert len(told["tensors"]) == 5
