"""What goes to which optimizer, as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lab_utils.optim.groups import matrices, rule
from lab_utils.recipe import OptimSection

if TYPE_CHECKING:
    from torch import nn

NamedShapes = Iterable[tuple[str, tuple[int, ...]]]


def assignment_table(
    model: nn.Module | NamedShapes, config: Any, section: OptimSection
) -> list[dict[str, Any]]:
    """Rows in the model's order, one for each name pattern and shape.

    A row is ``{"name", "algorithm", "shape", "count", "parameters", "weight_decay"}``: the name with ``*`` for every
    number; ``shape`` is that of a matrix for Muon, of the whole tensor for AdamW; ``count`` of them are there.

    Args:
        model: a model, or names and shapes as ``shapes_of`` gives them.
        config: the model's configuration.
        section: which optimizer, and its weight decay.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for name, shape in _named_shapes(model):
        algorithm, decay = rule(name, shape, config, section)
        views = matrices(name, shape, config) if algorithm == "muon" else None
        parts = [(view.rows, view.cols) for view in views] if views else [shape]
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        for part in parts:
            row = found.setdefault(
                (pattern, algorithm, part),
                {
                    "name": pattern,
                    "algorithm": algorithm,
                    "shape": list(part),
                    "count": 0,
                    "parameters": 0,
                    "weight_decay": decay,
                },
            )
            row["count"] += 1
            row["parameters"] += _elements(part)
    return list(found.values())


def totals(table: list[dict[str, Any]]) -> dict[str, int]:
    """Parameters of each algorithm and bytes of optimizer state: 4 a parameter for Muon, 8 for AdamW."""
    of = {
        algorithm: sum(row["parameters"] for row in table if row["algorithm"] == algorithm)
        for algorithm in ("muon", "adamw")
    }
    return {**of, "state_bytes": 4 * of["muon"] + 8 * of["adamw"]}


def shapes_of(config: Any, *, mtp: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter of a configuration's model, without memory for one.

    Args:
        mtp: with the blocks of multi-token prediction, where the configuration has any.
    """
    import torch

    if config.model_type == "deepseek_v4":
        from lab_utils.models.deepseek_v4.materialise import without_memory

        depths = config.num_nextn_predict_layers if mtp else 0
        return _named_shapes(without_memory(config, mtp_loss=1.0 if depths else 0.0))
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return _named_shapes(model)


def _named_shapes(model: nn.Module | NamedShapes) -> list[tuple[str, tuple[int, ...]]]:
    named = model.named_parameters() if hasattr(model, "named_parameters") else None
    return [(name, tuple(parameter.shape)) for name, parameter in named] if named else list(model)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
