"""Checkpoints: whole or not there, checksummed, at any number of ranks.

Layout of ``checkpoints/step-000100/``::

    model/          safetensors in transformers' layout, config.json, tokenizer: loadable by itself
    optimizer/      part-RRRRR-NNN.safetensors: ``NAME/master``, ``NAME/exp_avg``…: fp32, in the parameter's shape;
                    of a parameter spread over ranks ``NAME[START:STOP]/master``: these rows of its first dimension
    state.json      step, counters, loader, generators of each rank, layout
    MANIFEST.json   bytes and sha256 of every file above
    COMPLETE        written last

Everything is written into a hidden folder beside it, synced to disk, and renamed. Older checkpoints are removed only
after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lab_utils.engine.reduce import gather_objects
from lab_utils.engine.rows import Rows
from lab_utils.engine.sharded_model import ShardedFiles
from lab_utils.errors import CheckpointError
from lab_utils.models.load import save_tensors

PART_BYTES = 2**30  # an optimizer file is closed when it has grown to this
RANGE = re.compile(r"\[(\d+):\d+\]$")
Problem = str


def folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


# -- writing -------------------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    *,
    write_model: Callable[..., None],
    optimizer_state: Iterable[tuple[str, Rows, dict[str, Tensor]]],
    shards: ShardedFiles | None = None,
    state: dict[str, Any],
    rank: int,
    keep_last: int,
) -> Path:
    """Write a checkpoint; called by all ranks together.

    Args:
        root: the run's ``checkpoints`` folder.
        write_model: fills the ``model/`` folder, ``write_model(folder, tensors=shards is None)``; called on rank 0.
        optimizer_state: this rank's share by parameter name; iterating it is collective.
        shards: the tensors of a model that is spread over ranks; absent: ``write_model`` writes them.
        state: what ``state.json`` holds, the same on every rank.
        keep_last: complete checkpoints that stay.

    Raises:
        CheckpointError: on every rank, if any could not write; what was written is removed and older ones are intact.
    """
    final = folder(root, step)
    temporary = root / f".{final.name}.partial"
    _agree(final, _attempt(lambda: _make_folders(temporary)) if rank == 0 else None, temporary, rank)
    problem = _attempt(
        lambda: _write_optimizer(temporary / "optimizer", optimizer_state, rank), drain=optimizer_state
    )
    if rank == 0 and problem is None:
        problem = _attempt(
            lambda: (
                write_model(temporary / "model", tensors=shards is None),
                _write_json(temporary / "state.json", state),
            )
        )
    if shards is not None:
        if rank == 0 and problem is None:
            problem = _attempt(lambda: shards.create(temporary / "model"))
        _agree(final, problem, temporary, rank)
        problem = _attempt(lambda: shards.write(temporary / "model"))
    _agree(final, problem, temporary, rank)

    def publish() -> None:
        manifest = {name: _describe(temporary / name) for name in _files(temporary)}
        _write_json(temporary / "MANIFEST.json", manifest)
        (temporary / "COMPLETE").touch()
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if final.exists():  # a broken one, which resume has passed over and these steps have replaced
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(root)

    _agree(final, _attempt(publish) if rank == 0 else None, temporary, rank)
    if rank == 0:
        for old in complete(root)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _make_folders(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    for part in ("model", "optimizer"):
        (temporary / part).mkdir(parents=True)


def _write_optimizer(
    target: Path, named_state: Iterable[tuple[str, Rows, dict[str, Tensor]]], rank: int
) -> None:
    part: dict[str, Tensor] = {}
    number = size = 0
    for name, rows, tensors in named_state:
        for kind, value in tensors.items():
            part[_key(name, rows, kind)] = value.detach().cpu().contiguous().clone()
            size += value.numel() * value.element_size()
        if size >= PART_BYTES:
            save_tensors(part, target / f"part-{rank:05d}-{number:03d}.safetensors")
            part, number, size = {}, number + 1, 0
    if part:
        save_tensors(part, target / f"part-{rank:05d}-{number:03d}.safetensors")


def _attempt(work: Callable[[], Any], drain: Iterable[Any] | None = None) -> Problem | None:
    """Run a piece of writing; what went wrong comes back as text, since other ranks wait for the verdict.

    ``drain`` is run to its end after a failure: the other ranks are inside its collectives.
    """
    try:
        work()
    except (OSError, SafetensorError) as error:
        for _ in drain or ():
            pass
        return str(error)
    return None


def _agree(final: Path, problem: Problem | None, temporary: Path, rank: int) -> None:
    """All ranks go on, or all stop with the same sentence."""
    problems = {r: p for r, p in enumerate(gather_objects(problem)) if p}
    if problems:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        worst, text = next(iter(problems.items()))
        raise CheckpointError(
            f"{final}: rank {worst} could not write the checkpoint ({text}); earlier checkpoints are intact: "
            f"make room on that disk, then resume the run."
        )


def _files(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- reading -------------------------------------------------------------------------------------------------


def complete(root: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first; whether they still are what they were is ``problems``' question."""
    return sorted(p for p in root.glob("step-*") if (p / "COMPLETE").exists())


def problems(checkpoint: Path, *, share: tuple[int, int] = (0, 1)) -> list[Problem]:
    """What is wrong with a checkpoint: files missing, cut short or altered, each named; empty if it is whole.

    Args:
        share: ``(rank, ranks)``; files are dealt out among that many readers.
    """
    try:
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [f"{checkpoint / 'MANIFEST.json'} cannot be read"]
    found = []
    for name in sorted(manifest)[share[0] :: share[1]]:
        path, expected = checkpoint / name, manifest[name]
        if not path.exists():
            found.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{path} has {path.stat().st_size} bytes, expected {expected['bytes']}")
        elif _describe(path)["sha256"] != expected["sha256"]:
            found.append(f"{path} does not have the sha256 that the manifest records")
    return found


def newest(root: Path, *, rank: int = 0, world: int = 1) -> tuple[Path | None, list[Problem]]:
    """The newest whole checkpoint, and what is wrong with newer ones that had to be passed over.

    With ``world > 1`` all ranks call it together and share the reading.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    skipped: list[Problem] = []
    candidates = complete(root)
    for checkpoint in reversed(candidates):
        found = problems(checkpoint, share=(rank, world))
        found = [p for part in gather_objects(found) for p in part] if world > 1 else found
        if not found:
            return checkpoint, skipped
        skipped += found
    if candidates:
        raise CheckpointError(
            f"No checkpoint in {root} is whole: {skipped[0]}; restore that file, "
            f"or remove the folder to start again from the recipe's model."
        )
    return None, skipped


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def _key(name: str, rows: Rows, kind: str) -> str:
    return f"{name}/{kind}" if rows.whole else f"{name}[{rows.start}:{rows.stop}]/{kind}"


class OptimizerFiles:
    """The optimizer state of a checkpoint by parameter name, any rows of it; reads only the bytes asked for."""

    def __init__(self, checkpoint: Path) -> None:
        # name -> kind -> [(first row, file, key)], in order of rows
        self._parts: dict[str, dict[str, list[tuple[int, Path, str]]]] = {}
        for path in sorted((checkpoint / "optimizer").glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    name, _, kind = key.rpartition("/")
                    found = RANGE.search(name)
                    name, start = (name[: found.start()], int(found[1])) if found else (name, 0)
                    self._parts.setdefault(name, {}).setdefault(kind, []).append((start, path, key))
        for kinds in self._parts.values():
            for parts in kinds.values():
                parts.sort(key=lambda part: part[0])

    def names(self) -> list[str]:
        return list(self._parts)

    def read(self, name: str, rows: Rows | None = None) -> dict[str, Tensor]:
        """State of a parameter, or of some rows of it: ``master`` and what the optimizer keeps.

        Raises:
            CheckpointError: rows that are in no file.
        """
        return {kind: self._rows(name, parts, rows) for kind, parts in self._parts[name].items()}

    def _rows(self, name: str, parts: list[tuple[int, Path, str]], rows: Rows | None) -> Tensor:
        found, at = [], rows.start if rows else 0
        for start, path, key in parts:
            with safe_open(path, framework="pt") as file:
                view = file.get_slice(key)
                shape = view.get_shape()
                if not shape:  # a scalar state, the same for every run of rows
                    return file.get_tensor(key)
                stop = start + shape[0]
                last = min(stop, rows.stop) if rows else stop
                if start <= at < last:
                    found.append(view[at - start : last - start])
                    at = last
        if not found or (rows and at != rows.stop):
            raise CheckpointError(
                f"{parts[0][1].parent}: rows from {at} on of '{name}' are in no file; the checkpoint is of another "
                f"model, or files of it are gone: restore them."
            )
        return found[0] if len(found) == 1 else torch.cat(found)


def load_optimizer(checkpoint: Path, optimizer: Any) -> None:
    """Give every parameter of a ``ZeroOptimizer`` its master and state, whatever ranks wrote them.

    Raises:
        CheckpointError: the checkpoint is of another model: a parameter is absent, unknown or of another shape.
    """
    files = OptimizerFiles(checkpoint)
    missing = sorted(set(optimizer.places_by_name) - set(files.names()))
    if missing:
        raise CheckpointError(
            f"{checkpoint}: no optimizer state for parameter '{missing[0]}' ({len(missing)} such); "
            f"resume with the model that the run was started with."
        )
    for name, place in optimizer.places_by_name.items():
        tensors = files.read(name, place.rows)
        shape = tuple(tensors["master"].shape)
        if shape != place.shape:
            raise CheckpointError(
                f"{checkpoint}: parameter '{name}' of shape {list(shape)} does not fit this model; "
                f"resume with the model that the run was started with."
            )
        optimizer.load_named_state(name, tensors)
    held = {name for names in gather_objects(sorted(optimizer.places_by_name)) for name in names}
    unknown = sorted(set(files.names()) - held)
    if unknown:
        raise CheckpointError(
            f"{checkpoint}: parameter '{unknown[0]}' ({len(unknown)} such) is not in this model; "
            f"resume with the model that the run was started with."
        )
    optimizer.refresh_working()
