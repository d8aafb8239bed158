"""Pieces of the engine that need no ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab_utils.engine import checkpoint
from lab_utils.engine.audit import compare
from lab_utils.engine.control import Stop, StopRequests
from lab_utils.engine.rows import Rows
from lab_utils.errors import CheckpointError


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


def write(root: Path, step: int, **options: int) -> Path:
    root.mkdir(exist_ok=True)
    return checkpoint.save(
        root,
        step,
        write_model=lambda folder, tensors: (folder / "model.safetensors").write_bytes(b"weights"),
        optimizer_state=iter([("w", WHOLE, {"master": torch.ones(2, 2), "step": torch.tensor(3.0)})]),
        state={"step": step},
        rank=0,
        keep_last=options.get("keep_last", 3),
    )


def test_a_checkpoint_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 7)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert on_disk == {*manifest, "MANIFEST.json", "COMPLETE"}
    assert checkpoint.problems(path) == []
    files = checkpoint.OptimizerFiles(path)
    state = files.read("w")
    assert files.names() == ["w"] and state["master"].shape == (2, 2) and state["step"].shape == ()


@pytest.mark.parametrize("fault", ["cut", "altered", "gone", "no manifest", "empty manifest"])
def test_every_fault_is_seen_and_named(tmp_path: Path, fault: str) -> None:
    path = write(tmp_path / "c", 7)
    victim = path / "model" / "model.safetensors"
    if fault == "cut":
        victim.write_bytes(b"weight")
    elif fault == "altered":
        victim.write_bytes(b"Weights")
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


def test_a_failed_write_leaves_the_older_ones(tmp_path: Path) -> None:
    write(tmp_path / "c", 1, keep_last=1)

    def fails(folder: Path, tensors: bool) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
        checkpoint.save(
            tmp_path / "c", 2, write_model=fails, optimizer_state=iter([]), state={}, rank=0, keep_last=1
        )
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-000001"]


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
