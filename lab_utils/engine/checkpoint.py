"""Checkpoints: whole or not there, checksummed, at any number of ranks.

Layout of ``checkpoints/step-000100/``::

    model/          safetensors in transformers' layout, config.json, tokenizer: loadable by itself
    optimizer/      part-RRRRR-NNN.safetensors: ``NAME/master``, ``NAME/exp_avg``…: fp32, in the parameter's shape
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
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lab_utils.engine.reduce import gather_objects
from lab_utils.errors import CheckpointError
from lab_utils.models.load import save_tensors

PART_BYTES = 2**30  # an optimizer file is closed when it has grown to this
Problem = str


def folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


# -- writing -------------------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    optimizer_state: Iterable[tuple[str, dict[str, Tensor]]],
    state: dict[str, Any],
    rank: int,
    keep_last: int,
) -> Path:
    """Write a checkpoint; called by all ranks together.

    Args:
        root: the run's ``checkpoints`` folder.
        write_model: fills the ``model/`` folder; called on rank 0.
        optimizer_state: this rank's share, whole tensors by parameter name; iterating it is collective.
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
            lambda: (write_model(temporary / "model"), _write_json(temporary / "state.json", state))
        )
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


def _write_optimizer(target: Path, named_state: Iterable[tuple[str, dict[str, Tensor]]], rank: int) -> None:
    part: dict[str, Tensor] = {}
    number = size = 0
    for name, tensors in named_state:
        for kind, value in tensors.items():
            part[f"{name}/{kind}"] = value.detach().cpu().contiguous().clone()
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


def optimizer_state(checkpoint: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Whole tensors of each parameter's optimizer state, by name."""
    for path in sorted((checkpoint / "optimizer").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names: dict[str, list[str]] = {}
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                names.setdefault(key.rpartition("/")[0], []).append(key)
            for name, keys in names.items():
                yield name, {key.rpartition("/")[2]: file.get_tensor(key) for key in keys}


def load_optimizer(checkpoint: Path, optimizer: Any) -> None:
    """Give every parameter of a ``ZeroOptimizer`` its master and state, whatever ranks wrote them.

    Raises:
        CheckpointError: the checkpoint is of another model: a parameter is absent, unknown or of another shape.
    """
    wanted = dict(optimizer.shapes)
    for name, tensors in optimizer_state(checkpoint):
        shape = tuple(tensors["master"].shape)
        if wanted.pop(name, None) != shape:
            raise CheckpointError(
                f"{checkpoint}: parameter '{name}' of shape {list(shape)} does not fit this model; "
                f"resume with the model that the run was started with."
            )
        optimizer.load_named_state(name, tensors)
    if wanted:
        raise CheckpointError(
            f"{checkpoint}: no optimizer state for parameter '{next(iter(wanted))}' ({len(wanted)} such); "
            f"resume with the model that the run was started with."
        )
    optimizer.refresh_working()
