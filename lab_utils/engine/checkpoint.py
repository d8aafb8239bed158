"""Checkpoints: whole or not there, checksummed, at any number of ranks.

Layout of ``checkpoints/step-000100/``::

    model/          safetensors in transformers' layout, config.json, tokenizer: loadable by itself
    optimizer/      part-RRRRR-NNN.safetensors: ``NAME/master``, ``NAME/exp_avg``…: fp32, in the parameter's shape;
                    of a parameter spread over ranks ``NAME[START:STOP]/master``: these rows of its first dimension
    state.json      step, counters, loader, generators of each rank, layout
    MANIFEST.json   bytes and sha256 of every file above
    COMPLETE        written last

Everything is written into a hidden folder beside it, ``.step-000100.partial``, synced to disk, and renamed. Older
checkpoints are removed only after that. Who writes when is ``writer.py``, whose ranks talk through a folder ``ranks/``
in the hidden one; here is what they write.
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
from safetensors import safe_open
from torch import Tensor

from lab_utils.engine.reduce import gather_objects
from lab_utils.engine.rows import Rows
from lab_utils.engine.sharded_model import ShardedFiles, host_copy, write_file
from lab_utils.errors import CheckpointError

PART_BYTES = 2**30  # an optimizer file is closed when it has grown to this
READ_BYTES = 2**23  # hashed at a time: Python's lock is taken once for each
RANGE = re.compile(r"\[(\d+):\d+\]$")
RANKS = "ranks"
Described = dict[str, dict[str, Any]]  # bytes and sha256 of files, by path in the checkpoint


def folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


# -- writing -------------------------------------------------------------------------------------------------


def partial(final: Path) -> Path:
    """The hidden folder that becomes a checkpoint."""
    return final.with_name(f".{final.name}.partial")


def make_partial(final: Path) -> Path:
    """The hidden folder, fresh."""
    made = partial(final)
    shutil.rmtree(made, ignore_errors=True)
    for part in ("model", "optimizer", RANKS):
        (made / part).mkdir(parents=True)
    return made


def remove_partial(root: Path) -> None:
    """Hidden folders of a job that was killed while it wrote."""
    for left in root.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)


class Share:
    """What one rank writes of a checkpoint, in host memory, so that training can go on; making one is collective.

    Args:
        model, writes: as ``ShardedFiles`` takes them.
        optimizer_state: this rank's share by parameter name; iterating it is collective.
        write_config: fills ``model/`` with all but tensors; called later, on rank 0.
        state: what ``state.json`` holds.
    """

    def __init__(
        self,
        rank: int,
        *,
        model: torch.nn.Module,
        writes: Callable[[Tensor], bool],
        optimizer_state: Iterable[tuple[str, Rows, dict[str, Tensor]]],
        write_config: Callable[[Path], None],
        state: dict[str, Any],
    ) -> None:
        self.rank, self._model, self._write_config = rank, ShardedFiles(model, writes), write_config
        self._state = json.dumps(state, indent=1) if rank == 0 else ""
        self._parts: list[dict[str, Tensor]] = []
        room = 0
        for name, rows, tensors in optimizer_state:
            if room <= 0:
                self._parts.append({})
                room = PART_BYTES
            for kind, value in tensors.items():
                self._parts[-1][_key(name, rows, kind)] = host_copy(value)
                room -= value.nbytes

    def write(self, target: Path) -> Described:
        """Write and sync it, giving back memory on the way; returns the files that are this rank's alone."""
        if self.rank == 0:
            self._model.create(target / "model")
            self._write_config(target / "model")
            (target / "state.json").write_text(self._state, encoding="utf-8")
        self._model.write(target / "model")
        part = f"optimizer/part-{self.rank:05d}"
        names = [f"{part}-{number:03d}.safetensors" for number in range(len(self._parts))]
        for name in names:
            write_file(target / name, self._parts.pop(0))
        return {name: _describe(target / name) for name in names}

    def describe(self, target: Path, ranks: int) -> Described:
        """Of the model's files of tensors, in which several ranks may have written, every ``ranks``-th."""
        return {
            f"model/{name}": _describe(target / "model" / name)
            for name in self._model.names[self.rank :: ranks]
        }


def publish(final: Path, described: Described, keep_last: int) -> None:
    """Make a checkpoint of the hidden folder, in which everything is written; one rank does it.

    Args:
        described: files whose bytes and sha256 are known already.
        keep_last: complete checkpoints that stay.
    """
    source = partial(final)
    shutil.rmtree(source / RANKS)
    names = described.keys() | {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    manifest = {name: described.get(name) or _describe(source / name) for name in sorted(names)}
    (source / "MANIFEST.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    (source / "COMPLETE").touch()
    for path in [*source.rglob("*"), source]:
        _sync(path)
    if final.exists():  # a broken one, which resume has passed over and these steps have replaced
        shutil.rmtree(final)
    source.rename(final)
    _sync(final.parent)
    # A later one is broken: resume has passed over it.
    for old in [p for p in complete(final.parent) if p.name <= final.name][:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)


def _key(name: str, rows: Rows, kind: str) -> str:
    return f"{name}/{kind}" if rows.whole else f"{name}[{rows.start}:{rows.stop}]/{kind}"


def _describe(path: Path) -> dict[str, Any]:
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"bytes": size, "sha256": digest.hexdigest()}


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


def problems(checkpoint: Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
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


def newest(root: Path, *, rank: int = 0, world: int = 1) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones that had to be passed over.

    With ``world > 1`` all ranks call it together and share the reading.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    skipped: list[str] = []
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
