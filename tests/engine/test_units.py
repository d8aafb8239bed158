"""Pieces of the engine that need no ranks."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lab_utils.engine import checkpoint
from lab_utils.engine.audit import compare
from lab_utils.engine.clock import StepClock
from lab_utils.engine.control import Stop, StopRequests
from lab_utils.engine.rows import Rows
from lab_utils.engine.writer import Writer
from lab_utils.engine.zero import norm_of
from lab_utils.errors import CheckpointError
from lab_utils.optim.dealing import assign, even_shards
from lab_utils.recipe import Recipe


def test_the_command_line_part_imports_no_torch() -> None:
    code = "import lab_utils.engine.commands, sys; sys.exit('torch' in sys.modules or 'colossalai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_stand_ins_are_gone_after_the_import() -> None:
    code = (
        "import sys, lab_utils.engine.colossal;"
        "sys.exit(any(n.split('.')[0] in ('galore_torch', 'bitsandbytes') for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_signal_asks_for_a_checkpoint_and_a_stop() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    requests = StopRequests(SimpleNamespace(control={"action": None}))
    with requests.listening():
        assert requests.pending() == Stop.NO
        signal.raise_signal(signal.SIGUSR1)
        assert requests.pending() == Stop.AFTER_CHECKPOINT
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_control_file_is_heard() -> None:
    for action, expected in (
        ("stop", Stop.NOW),
        ("checkpoint_and_stop", Stop.AFTER_CHECKPOINT),
        (None, Stop.NO),
    ):
        assert StopRequests(SimpleNamespace(control={"action": action})).pending() == expected


def test_audit_tells_parameters_from_buffers_and_names_the_unchanged() -> None:
    before = {
        "a.weight": torch.ones(4),
        "b.indexer.w": torch.ones(2),
        "z": torch.zeros(3),
        "table": torch.arange(3),
    }
    after = {**before, "a.weight": torch.ones(4) * 1.5, "z": torch.full((3,), 2.0)}
    report = compare(before, after, {"a.weight", "b.indexer.w", "z"})
    assert (report["tensors"], report["changed"], report["unchanged"]) == (3, 2, ["b.indexer.w"])
    assert report["indexer_changed"] is False
    changes = {row["name"]: row["relative_change"] for row in report["by_tensor"]}
    assert changes["a.weight"] == pytest.approx(0.5) and changes["z"] == pytest.approx(12**0.5)
    assert [row["name"] for row in report["buffers"]] == ["table"]
    assert compare({"x": torch.ones(1)}, {"x": torch.ones(1)}, {"x"})["indexer_changed"] is None


def test_audit_refuses_another_model() -> None:
    with pytest.raises(CheckpointError, match="'b' is only in one"):
        compare({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, {"a"})


WHOLE = Rows(0, 2, 2)


def share(**changes: Any) -> dict[str, Any]:
    """What one rank alone saves of a small model."""
    given = {
        "model": torch.nn.Linear(3, 2, bias=False),
        "writes": lambda tensor: True,
        "optimizer_state": iter([("w", WHOLE, {"master": torch.ones(2, 2), "step": torch.tensor(3.0)})]),
        "write_config": lambda folder: (folder / "config.json").write_text("{}"),
        "state": {"step": 1},
    }
    return {**given, **changes}


def writer(root: Path, keep_last: int = 3) -> Writer:
    root.mkdir(exist_ok=True)
    return Writer(root, rank=0, ranks=1, keep_last=keep_last, completed=lambda path: None)


def write(root: Path, step: int, **options: int) -> Path:
    one = writer(root, **options)
    one.start(step, **share())
    one.finish()
    return checkpoint.folder(root, step)


def test_a_checkpoint_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 7)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert on_disk == {*manifest, "MANIFEST.json", "COMPLETE"}
    assert {p.name for p in path.iterdir() if p.is_dir()} == {"model", "optimizer"}
    expected = {
        "model/model.safetensors",
        "model/config.json",
        "optimizer/part-00000-000.safetensors",
        "state.json",
    }
    assert set(manifest) == expected
    assert checkpoint.problems(path) == []
    files = checkpoint.OptimizerFiles(path)
    state = files.read("w")
    assert files.names() == ["w"] and state["master"].shape == (2, 2) and state["step"].shape == ()


@pytest.mark.parametrize("fault", ["cut", "altered", "gone", "no manifest", "empty manifest"])
def test_every_fault_is_seen_and_named(tmp_path: Path, fault: str) -> None:
    path = write(tmp_path / "c", 7)
    victim = path / "model" / "model.safetensors"
    if fault == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif fault == "altered":
        data = victim.read_bytes()
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif fault == "gone":
        victim.unlink()
    elif fault == "no manifest":
        victim = path / "MANIFEST.json"
        victim.unlink()
    else:
        victim = path / "MANIFEST.json"
        victim.write_text("")
    (found,) = checkpoint.problems(path)
    assert victim.name in found
    with pytest.raises(CheckpointError, match=victim.name):
        checkpoint.newest(tmp_path / "c")


def test_an_unfinished_checkpoint_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 7)
    (path / "COMPLETE").unlink()
    assert checkpoint.newest(tmp_path / "c") == (None, [])


def test_a_broken_later_checkpoint_does_not_push_out_the_new_one(tmp_path: Path) -> None:
    root = tmp_path / "c"
    for step in (2, 4, 6):
        write(root, step)
    (root / "step-000006" / "state.json").unlink()
    write(root, 5, keep_last=1)
    assert checkpoint.newest(root)[0] == root / "step-000005"
    assert sorted(p.name for p in root.iterdir()) == ["step-000005", "step-000006"]


def test_a_failed_write_leaves_the_older_ones(tmp_path: Path) -> None:
    write(tmp_path / "c", 1, keep_last=1)

    def fails(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    one = writer(tmp_path / "c", keep_last=1)
    one.start(2, **share(write_config=fails))
    with pytest.raises(CheckpointError, match=r"rank 0 could not.*No space left on device.*make room"):
        one.finish()
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-000001"]
    one.start(3, **share())
    one.finish()
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-000003"], (
        "the writer itself is none the worse"
    )


def test_a_defect_in_the_background_is_an_error_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def fails(folder: Path) -> None:
        raise KeyError("vocabulary")

    one = writer(tmp_path / "c")
    one.start(2, **share(write_config=fails))
    with pytest.raises(CheckpointError, match="KeyError: 'vocabulary'"):
        one.finish()
    assert "Traceback" in capsys.readouterr().err


def test_what_is_saved_is_the_state_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is changed in place while a writer is held up; the next save waits for it."""
    release, real, told = threading.Event(), checkpoint.Share.write, []

    def held(self: checkpoint.Share, target: Path) -> Any:
        assert release.wait(60)
        return real(self, target)

    monkeypatch.setattr(checkpoint.Share, "write", held)
    root = tmp_path / "c"
    root.mkdir()
    one = Writer(root, rank=0, ranks=1, keep_last=3, completed=told.append)
    model, master, count = torch.nn.Linear(3, 2, bias=False), torch.ones(2, 2), torch.tensor(3.0)
    before = model.weight.detach().clone()
    state = {"step": 1, "rng": [1, 2]}
    named = iter([("w", WHOLE, {"master": master, "step": count})])
    one.start(1, **share(model=model, optimizer_state=named, state=state))
    with torch.no_grad():
        for tensor in (model.weight, master, count):
            tensor.add_(1)
    state["rng"].append(3)
    one.look()
    assert not told and not checkpoint.complete(root)
    release.set()
    one.start(2, **share(model=model))
    assert told == [root / "step-000001"], "one at a time"
    one.finish()
    assert told == [root / "step-000001", root / "step-000002"]
    saved = checkpoint.OptimizerFiles(told[0]).read("w")
    assert torch.equal(saved["master"], torch.ones(2, 2)) and saved["step"] == 3
    assert torch.equal(load_file(told[0] / "model" / "model.safetensors")["weight"], before)
    assert checkpoint.read_state(told[0])["rng"] == [1, 2]


def test_a_tied_weight_is_saved_once(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Linear(3, 2, bias=False)})
    model["head"] = model["embed"]
    one = writer(tmp_path / "c")
    one.start(1, **share(model=model))
    one.finish()
    saved = load_file(tmp_path / "c" / "step-000001" / "model" / "model.safetensors")
    assert list(saved) == ["embed.weight"]


def test_a_large_state_goes_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PART_BYTES", 20)
    named = [(name, WHOLE, {"master": torch.full((2,), float(i))}) for i, name in enumerate("abcdef")]
    one = writer(tmp_path / "c")
    one.start(1, **share(optimizer_state=iter(named)))
    one.finish()
    path = tmp_path / "c" / "step-000001"
    assert len(list((path / "optimizer").iterdir())) == 2 and checkpoint.problems(path) == []
    files = checkpoint.OptimizerFiles(path)
    assert [float(files.read(name)["master"][0]) for name in "abcdef"] == [0, 1, 2, 3, 4, 5]


def ranks_of_one_process(monkeypatch: pytest.MonkeyPatch, number: int, work: Any) -> list[Any]:
    """``work(rank)`` in a thread for each rank, with the agreements of main threads between them."""
    barrier, slots, rank_of = threading.Barrier(number, timeout=60), [None] * number, threading.local()

    def gather(value: Any) -> list[Any]:
        slots[rank_of.value] = value
        barrier.wait()
        found = list(slots)
        barrier.wait()
        return found

    monkeypatch.setattr("lab_utils.engine.writer.gather_objects", gather)
    monkeypatch.setattr("lab_utils.engine.sharded_model.gather_objects", gather)

    def one(rank: int) -> Any:
        rank_of.value = rank
        return work(rank)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


@pytest.mark.parametrize("full", [None, 0, 2, "every rank", "no word"])
def test_three_ranks_agree_on_a_checkpoint_or_on_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Any
) -> None:
    """A rank without room; all of them; and one that cannot even say so."""
    root, real = tmp_path / "c", checkpoint.Share.write
    root.mkdir()

    def write_or_not(self: checkpoint.Share, target: Path) -> Any:
        if full in (self.rank, "every rank") or (full == "no word" and self.rank == 2):
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(checkpoint.Share, "write", write_or_not)
    if full == "no word":
        monkeypatch.setattr("lab_utils.engine.writer.Words.fail", lambda self, problem: None)
    weight = torch.arange(12.0).reshape(6, 2)

    def work(rank: int) -> str:
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(weight[2 * rank : 2 * rank + 2].clone())
        model.weight.rows = (2 * rank, 6)
        named = iter([("weight", Rows(2 * rank, 2 * rank + 2, 6), {"master": model.weight})])
        one = Writer(root, rank=rank, ranks=3, keep_last=3, completed=lambda path: None)
        try:
            one.start(1, **share(model=model, optimizer_state=named))
            one.finish()
        except CheckpointError as error:
            assert not one.failed, "told once"
            return str(error)
        return "saved"

    found = ranks_of_one_process(monkeypatch, 3, work)
    monkeypatch.undo()
    assert len(set(found)) == 1
    if full is None:
        path = root / "step-000001"
        assert found[0] == "saved" and checkpoint.problems(path) == []
        assert torch.equal(load_file(path / "model" / "model.safetensors")["weight"], weight)
        assert torch.equal(checkpoint.OptimizerFiles(path).read("weight")["master"], weight)
    else:
        worst = 0 if full == "every rank" else 2 if full == "no word" else full
        assert f"rank {worst} could not write the checkpoint ([Errno 28] No space left" in found[0]
        assert list(root.iterdir()) == []


def test_a_run_that_fails_leaves_the_checkpoint_under_way_complete(tmp_path: Path) -> None:
    root, told = tmp_path / "c", []
    root.mkdir()
    one = Writer(root, rank=0, ranks=1, keep_last=3, completed=told.append)
    one.start(1, **share())
    one.leave()
    assert told == [root / "step-000001"] and checkpoint.problems(told[0]) == []
    one.leave()
    one.finish()


def test_a_dead_rank_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab_utils.engine.writer.LAST_SECONDS", 0.2)
    root = tmp_path / "c"
    root.mkdir()
    one = Writer(root, rank=0, ranks=2, keep_last=3, completed=lambda path: None)
    one.start(1, **share())
    one.leave()
    assert not checkpoint.complete(root)
    checkpoint.remove_partial(root)
    assert list(root.iterdir()) == [], "what it leaves is gone when the run is opened again"


def test_a_rank_that_says_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab_utils.engine.writer.PEER_SECONDS", 0.1)
    root = tmp_path / "c"
    root.mkdir()
    one = Writer(root, rank=0, ranks=2, keep_last=3, completed=lambda path: None)
    one.start(1, **share())
    with pytest.raises(CheckpointError, match="rank 1 has not said 'written'"):
        one.finish()


def test_how_checkpoints_are_written_is_not_in_the_hash_of_a_recipe() -> None:
    recipe = Recipe.parse({"data": {"train": [{"manifest": "none"}]}})
    assert recipe.schedule.async_save
    assert recipe.with_changes({"schedule.async_save": False}).hash == recipe.hash
    assert recipe.with_changes({"schedule.steps": 7}).hash != recipe.hash


def test_the_wait_for_a_checkpoint_counts_to_the_step_that_follows() -> None:
    clock = StepClock(lambda: None)

    def logged() -> dict[str, float]:
        clock.restart()
        with clock.part("optimizer"):
            pass
        return {key: metric.total for key, metric in clock.metrics().items()}

    first = logged()
    with clock.part("checkpoint"):
        time.sleep(0.05)
    second, third = logged(), logged()
    assert first["perf/time/checkpoint"] == third["perf/time/checkpoint"] == 0.0
    assert second["perf/time/checkpoint"] >= 0.05
    for line in (first, second, third):
        parts = sum(value for key, value in line.items() if key != "perf/step_time")
        assert parts == pytest.approx(line["perf/step_time"])


def test_time_of_a_part_within_another_counts_once() -> None:
    clock = StepClock(lambda: None)
    with clock.part("generate"), clock.part("weight_sync"):
        with clock.part("checkpoint"):
            time.sleep(0.03)
        time.sleep(0.02)
    found = {key.removeprefix("perf/time/"): metric.total for key, metric in clock.metrics().items()}
    assert found["checkpoint"] >= 0.03 > found["weight_sync"] >= 0.02 > found["generate"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 1)
    cases = (({"w": (3, 3)}, "rows from 2 on of 'w'"), ({"w": (2, 1)}, "'w' of shape"))
    cases += (({"w": (2, 2), "v": (1,)}, "parameter 'v'"), ({}, "parameter 'w'.*is not in this model"))
    for shapes, text in cases:
        places = {k: SimpleNamespace(shape=v, rows=Rows(0, v[0], v[0])) for k, v in shapes.items()}
        optimizer = SimpleNamespace(
            places_by_name=places, load_named_state=lambda *_: None, refresh_working=lambda: None
        )
        with pytest.raises(CheckpointError, match=text):
            checkpoint.load_optimizer(path, optimizer)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.sampled_from([1, 2, 6, 8, 12, 128]))
def test_matrices_are_dealt_out_over_as_many_ranks_as_stay_even(sizes: list[int], ranks: int) -> None:
    shards = even_shards(sizes, ranks)
    assert ranks % shards == 0

    def uneven(count: int) -> float:
        owners = assign(sizes, count)
        loads = [sum(s for s, o in zip(sizes, owners) if o == rank) for rank in range(count)]
        return max(loads) / (sum(sizes) / count)

    assert uneven(shards) <= 1.1
    assert all(uneven(count) > 1.1 for count in range(shards + 1, ranks + 1) if ranks % count == 0)


def test_the_dense_matrices_of_a_stage_of_pro_go_over_some_ranks_of_128() -> None:
    """The largest, q_b_proj of 65,536 × 1,536, is a fifteenth of four layers: 128 ranks cannot share them evenly."""
    from lab_utils.models.presets import preset
    from lab_utils.optim.groups import matrices
    from lab_utils.optim.table import shapes_of

    config = preset("pro")
    layers = re.compile(r"model\.layers\.2[0-3]\.")
    stage = [(n, s) for n, s in shapes_of(config) if layers.match(n) and ".experts." not in n]
    sizes = [view.size for name, shape in stage for view in matrices(name, shape, config) or []]
    shards = even_shards(sizes, 128)
    assert 8 <= shards <= 16


@given(st.integers(0, 5000), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_norm_is_that_of_fp64(length: int, seed: int) -> None:
    flat = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    assert float(norm_of(flat)) == pytest.approx(float(flat.double().norm()), rel=1e-6)


def test_a_norm_of_millions_loses_nothing_on_a_cpu() -> None:
    flat = torch.randn(6_000_001, generator=torch.Generator().manual_seed(0))
    assert float(norm_of(flat)) == pytest.approx(float(flat.double().norm()), rel=1e-6)
