"""Did training change every weight? Measured, tensor by tensor, from the weights that the run began with.

"Full-parameter" is a claim about each tensor. The lightning indexer is named apart: the language-model loss gives it no
gradient, so only its own loss moves it.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lab_utils.engine import checkpoint
from lab_utils.errors import CheckpointError
from lab_utils.recipe import Recipe

INDEXER = ".indexer."


def audit(run_dir: Any) -> dict[str, Any]:
    """Compare the newest checkpoint of a run with the weights that its recipe starts from: see ``measure``.

    The report is kept as audit.json in the run directory, where it can be written, and the run card is made again.
    """
    from lab_utils.runs import card
    from lab_utils.runs.directory import RunDirectory, write_atomic

    report = measure(run_dir)
    with contextlib.suppress(OSError):
        write_atomic(Path(run_dir.path) / "audit.json", json.dumps(report, indent=1))
        card.refresh(RunDirectory(run_dir.path))
    return report


def measure(run_dir: Any) -> dict[str, Any]:
    """How far every tensor of the newest checkpoint is from the weights that the recipe starts from.

    Trained tensors are compared by their fp32 masters, so that a change too small for bf16 counts as what it is.

    Returns:
        ``checkpoint``, ``tensors`` and ``changed`` (numbers of parameters), ``unchanged`` (their names),
        ``indexer_changed`` (all of the indexer's; None for a model without one), ``by_tensor`` (name, shape, changed,
        relative_change = ‖after - before‖ / ‖before‖) and ``buffers`` (the same for what no gradient trains).

    Raises:
        CheckpointError: the run has no whole checkpoint.
    """
    from lab_utils.models.load import load_model

    recipe: Recipe = run_dir.recipe
    found, _ = checkpoint.newest(Path(run_dir.path) / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run_dir.path} has no checkpoint to audit: let the run save one first.")
    # With the parts that start fresh, by seed: multi-token prediction, the head of a reward model.
    start = load_model(
        recipe.model.source,
        dtype=getattr(torch, recipe.model.dtype),
        seed=recipe.seed,
        mtp_loss=recipe.model.mtp_loss,
        scored=recipe.objective.kind == "reward",
    )
    before, parameters = initial_tensors(start)
    report = compare(before, final_tensors(found), parameters)
    return {"run": Path(run_dir.path).name, "checkpoint": found.name, **report}


def compare(before: dict[str, Tensor], after: dict[str, Tensor], parameters: set[str]) -> dict[str, Any]:
    """The report on two states; ``parameters`` tells trained tensors from buffers.

    Raises:
        CheckpointError: a tensor is on one side only, or of another shape there.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())[0]
        raise CheckpointError(
            f"Tensor '{odd}' is only in one of start and checkpoint: the recipe's model has changed."
        )
    rows, buffers = [], []
    for name, old in before.items():
        new = after[name].reshape(old.shape) if after[name].numel() == old.numel() else None
        if new is None:
            raise CheckpointError(
                f"Tensor '{name}' has another size than at the start: the recipe's model has changed."
            )
        (rows if name in parameters else buffers).append(_row(name, old, new))
    unchanged = [row["name"] for row in rows if not row["changed"]]
    indexer = [row["changed"] for row in rows if INDEXER in row["name"]]
    return {
        "tensors": len(rows),
        "changed": len(rows) - len(unchanged),
        "unchanged": unchanged,
        "indexer_changed": all(indexer) if indexer else None,
        "by_tensor": rows,
        "buffers": buffers,
    }


def initial_tensors(model: torch.nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """State of a model, a tied tensor once under its first name, and the names of its parameters."""
    state, seen = {}, set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state[name] = value
    parameters = {name for name, value in state.items() if isinstance(value, torch.nn.Parameter)}
    return {name: value.detach() for name, value in state.items()}, parameters


def final_tensors(found: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: fp32 masters where there are any, else what ``model/`` holds."""
    tensors: dict[str, Tensor] = {}
    for path in sorted((found / "model").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    trained = checkpoint.OptimizerFiles(found)
    for name in trained.names():
        tensors[name] = trained.read(name)["master"]
    return tensors


def _row(name: str, old: Tensor, new: Tensor) -> dict[str, Any]:
    old64, new64 = old.double(), new.double()
    moved, size = float((new64 - old64).norm()), float(old64.norm())
    # A tensor that began at zero has no relative scale: its own norm is the change.
    relative = moved / size if size else moved
    return {"name": name, "shape": list(old.shape), "changed": moved > 0, "relative_change": relative}
