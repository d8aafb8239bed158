"""What the engine does with one and with two ranks. The ranks run ``trials.py``; here is what must come out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lab_utils.launchers._forked import command

pytestmark = pytest.mark.slow  # real processes: minutes

HERE = Path(__file__).parent
ONE_RANK = ["resumes_bit_for_bit", "resumes_at_another_number_of_ranks"]


def launch(ranks: int, folder: Path, *trials: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
        "ASCENT_CACHE": str(folder.parent / "cache"),
    }
    done = subprocess.run(
        command(ranks, str(HERE / "trials.py"), str(folder), *trials),
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("trials") / "two"
    return launch(2, folder), folder


@pytest.fixture(scope="session")
def two(two_ranks: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    return two_ranks[0]


@pytest.fixture(scope="session")
def one(two_ranks: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    folder = two_ranks[1].parent / "one"
    name = "resumes_at_another_number_of_ranks"
    shutil.copytree(two_ranks[1] / name, folder / name)
    return launch(1, folder, *ONE_RANK)


LAYOUTS = ["zero1", "zero1_accumulated", "zero1_rows_of_one", "zero1_checkpointing", "zero0"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_thirty_steps_follow_a_plain_loop(two: dict[str, Any], layout: str) -> None:
    seen = two["follows_a_plain_loop"][layout]
    assert seen["last"] < seen["first"] - 0.3, "the reference must learn, or agreement says nothing"
    assert seen["clipped"] > 0, "clipping must be part of what is compared"
    assert seen["loss"] < 1e-5
    assert seen["grad_norm"] < 1e-5
    assert seen["weights"] < 1e-4
    assert seen["unused_unchanged"], "a parameter without a gradient is left alone, weight decay included"


@pytest.mark.parametrize("layout", ["whole", "accumulated"])
def test_deepseek_v4_follows_a_plain_loop(two: dict[str, Any], layout: str) -> None:
    seen = two["v4_follows_a_plain_loop"]
    assert seen["last"] < seen["first"] - 1.0
    assert len(seen[layout]) == 30
    assert max(seen[layout]) < 1e-4


def test_packing_changes_no_loss(two: dict[str, Any]) -> None:
    for error in two["packing_changes_nothing"].values():
        assert error < 1e-5


def test_bf16_keeps_fp32_masters_and_fp32_parameters(two: dict[str, Any]) -> None:
    seen = two["bf16_follows_fp32"]
    assert seen["ranks"] == 2 and seen["finite"]
    assert seen["masters_fp32"] and seen["rounded"]
    assert seen["fell"] > 0.3
    assert seen["loss"] < 0.05
    again = two["repeats_its_bits"]
    assert again["buffer_kept"] and again["decay_moved_below_bf16"] > 0


def test_deepseek_v4_trains_in_bf16_and_with_recomputation(two: dict[str, Any]) -> None:
    seen = two["v4_in_bf16_with_checkpointing"]
    assert seen["recomputed"] == pytest.approx(seen["fp32"], rel=1e-6)
    for name in ("bf16", "both"):
        assert seen[name] == pytest.approx(seen["fp32"], abs=0.05)
        assert seen[name][-1] < seen[name][0]
        assert "torch.bfloat16" in seen[name + "_dtypes"]


def test_the_same_recipe_gives_the_same_bits(two: dict[str, Any]) -> None:
    assert two["repeats_its_bits"]["weights"] and two["repeats_its_bits"]["losses"]


@pytest.mark.parametrize("ranks", ["one", "two"])
@pytest.mark.parametrize("case", ["float32-zero1", "float32-zero0", "bfloat16-zero1", "bfloat16-zero0"])
def test_half_and_half_is_bit_for_bit_the_whole(
    case: str, ranks: str, request: pytest.FixtureRequest
) -> None:
    seen = request.getfixturevalue(ranks)["resumes_bit_for_bit"][case]
    assert seen["stopped_at"] == 3 and seen["moved"]
    for what in ("weights", "optimizer", "losses", "tokens", "generators"):
        assert seen[what], what


def test_one_rank_goes_on_where_two_left_off(one: dict[str, Any]) -> None:
    seen = one["resumes_at_another_number_of_ranks"]
    assert seen["ranks"] == 1
    assert seen["steps"] == list(range(1, 11))
    assert seen["loss"] < 1e-6


def test_a_nan_on_one_rank_drops_the_step_on_all(two: dict[str, Any]) -> None:
    seen = two["skips_what_is_not_finite"]
    assert seen["intact"] and seen["finite"] and seen["event"]
    assert seen["skipped"] == 1
    assert seen["steps"] == [1, 2, 3, 4, 5, 6]
    assert seen["logged"] == [0, 0, 1, 1, 1, 1]
    assert seen["loss_lines"] == 5, "the dropped step has no loss to log"


def test_too_many_in_a_row_end_the_run_at_its_last_good_state(two: dict[str, Any]) -> None:
    seen = two["stops_at_the_last_good_state"]
    assert "3 steps in a row" in seen["message"] and "step-000003" in seen["message"]
    assert seen["saved"] == ["step-000003"]
    assert seen["resumed_equals_clean"]


def test_a_request_to_stop_is_agreed_and_kept(two: dict[str, Any]) -> None:
    seen = two["stops_when_asked"]
    expected = {"step": 2, "checkpoints": [], "complete_when_stopped": [], "state": "stopped"}
    assert seen["stop"] == expected
    saved = ["step-000002"]
    assert seen["checkpoint_and_stop"] == {**expected, "checkpoints": saved, "complete_when_stopped": saved}


def test_only_the_last_checkpoints_stay(two: dict[str, Any]) -> None:
    seen = two["keeps_the_last"]
    assert seen["checkpoints"] == ["step-000005", "step-000006"]
    assert seen["evaluated"] == [2, 4, 6]
    assert seen["status"]["state"] == "succeeded"
    assert (seen["status"]["step"], seen["status"]["total_steps"], seen["status"]["world_size"]) == (6, 6, 2)


def test_a_logged_line_has_every_number_and_no_unknown_one(two: dict[str, Any]) -> None:
    from lab_utils.telemetry.names import lookup

    line = {k: v for k, v in two["keeps_the_last"]["last"].items() if k not in ("step", "time")}
    assert not [key for key in line if lookup(key) is None]
    names = ("data", "forward_backward", "optimizer", "checkpoint", "other")
    parts = sum(line[f"perf/time/{name}"] for name in names)
    assert parts == pytest.approx(line["perf/step_time"], rel=1e-6)
    assert line["perf/tokens_per_s"] == pytest.approx(2 * line["perf/tokens_per_s_per_chip"])
    assert 0 < line["perf/mfu"] < 1 and 0 < line["perf/padding_frac"] < 0.3
    assert line["train/learning_rate"] == pytest.approx(1e-3) and line["train/grad_norm"] > 0
    for key in (
        "train/loss",
        "train/entropy",
        "train/mean_token_accuracy",
        "train/indexer_kl",
        "train/num_tokens",
        "train/epoch",
        "mem/allocated_peak",
    ):
        assert key in line, key


@pytest.mark.parametrize("case", ["background", "last", "blocking"])
def test_a_full_disk_costs_nothing_that_was_saved(two: dict[str, Any], case: str) -> None:
    seen = two["survives_a_full_disk"][case]
    assert len(seen["messages"]) == 2 and len(set(seen["messages"])) == 1, "every rank says the same"
    message = seen["messages"][0]
    assert "step-000004: rank 1 could not write the checkpoint" in message and "make room" in message
    assert seen["left"] == ["step-000002"], "no half-written folder stays"
    assert seen["resumed_to"] == (4 if case == "last" else 6)


@pytest.mark.parametrize("case", ["float32", "bfloat16", "experts"])
def test_a_checkpoint_written_late_is_the_one_of_its_step(two: dict[str, Any], case: str) -> None:
    seen = two["saves_beside_training"][case]
    assert seen["exact"] == {str(step): True for step in range(1, 7)}
    for what in ("undisturbed", "resumed", "losses"):
        assert seen[what], what
    assert seen["events"] == [f"step-{step:06d}" for step in range(1, 7)]
    assert seen["waited"][0] == 0 and all(seconds > 0 for seconds in seen["waited"][1:])
    assert seen["left"] == ["COMPLETE", "MANIFEST.json", "model", "optimizer", "state.json"]


def test_a_step_waits_for_no_writer(two: dict[str, Any]) -> None:
    seen = two["steps_go_on_while_a_checkpoint_is_written"]
    assert seen["at_four"] == [] and seen["written"] == ["step 4 is done", 2, 4, 6]
    assert seen["blocking_at_three"] == ["step-000002"]


def test_a_damaged_checkpoint_is_named_and_never_loaded(two: dict[str, Any]) -> None:
    seen = two["sees_a_damaged_checkpoint"]
    assert "step-000006/optimizer" in seen["events"] and "expected" in seen["events"]
    assert "from step-000004" in seen["events"]
    assert seen["resumed_to"] == 6
    assert "sha256" in seen["message"] and "model.safetensors" in seen["message"]
