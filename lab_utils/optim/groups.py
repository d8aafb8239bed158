"""Which tensor goes to which optimizer, and where the matrices lie inside it.

Muon takes every matrix but the embedding and the head, one *logically independent* matrix at a time (TR §2.4,
algorithm 1); AdamW takes the rest. A parameter may store several matrices one below the other: those that the technical
report writes with symbols of their own. ``docs/optimizers.md`` has the table, and where others decide otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

from lab_utils.recipe import OptimSection

if TYPE_CHECKING:
    from torch import nn

EMBEDDINGS_AND_HEADS = (
    "head",
    "lm_head",
    "score",
    "output_layer",
    "wpe",
    "wte",
)  # and whatever has "embed" in its name


@dataclass(frozen=True)
class MatrixView:
    """A matrix ``[rows, cols]``: elements ``[start, start + rows · cols)`` of a flattened parameter."""

    start: int
    rows: int
    cols: int

    @property
    def size(self) -> int:
        return self.rows * self.cols


def matrices(name: str, shape: tuple[int, ...], config: Any = None) -> list[MatrixView] | None:
    """The independent matrices inside a parameter, in order and without a gap; None if the parameter is AdamW's.

    Args:
        name: global name in transformers' layout; multi-token prediction stands under ``mtp.``.
        shape: of the parameter, or of a slice of stacked experts (fewer of them, each whole).
        config: the model's configuration. Of DeepSeek-V4 it gives numbers of groups and widths of heads; of any other
            model the vocabulary, which tells an embedding by its shape.

    Raises:
        ValueError: the shape does not divide into the matrices that the configuration asks for.
    """
    *modules, leaf = name.removesuffix(".weight").split(".")
    if len(shape) == 3 and "experts" in modules:
        heights = _expert_heights(leaf, shape, config)
    elif len(shape) != 2 or leaf in EMBEDDINGS_AND_HEADS or "embed" in leaf:
        return None
    elif _is_deepseek_v4(config):
        if leaf == "position_bias":
            return None
        heights = _deepseek_v4_heights(leaf, modules[-1] if modules else "", shape[0], config)
    else:
        if shape[0] == getattr(config, "vocab_size", None):
            return None
        heights = [shape[0]]
    cols, stacked = shape[-1], shape[0] * (shape[1] if len(shape) == 3 else 1)
    if sum(heights) != stacked or 0 in heights:
        raise ValueError(
            f"{name}: {stacked} rows do not divide into the matrices that its configuration asks for."
        )
    views, row = [], 0
    for height in heights:
        views.append(MatrixView(row * cols, height, cols))
        row += height
    return views


def parameter_groups(model: nn.Module, section: OptimSection) -> list[dict[str, Any]]:
    """Groups for an optimizer: ``{"params", "names", "weight_decay", "algorithm": "adamw" | "muon"}``.

    With ``optim.kind: adamw`` everything is AdamW's. A Muon group holds whole parameters; who builds the optimizer cuts
    them by ``matrices``. Weight decay is for matrices (two dimensions or more, stacked experts included): pulling a
    norm's gain, a bias, a sink or a scale towards zero changes what the layer is, not how large its weights are. Order
    is the model's own, so that every rank and every restart sees the same groups; a group without members is left out,
    and a parameter shared by two modules appears once.
    """
    config = getattr(model, "config", None)
    members: dict[tuple[str, float], dict[str, nn.Parameter]] = {
        ("muon", section.weight_decay): {},
        ("adamw", section.weight_decay): {},
        ("adamw", 0.0): {},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = rule(name, tuple(parameter.shape), config, section)
            members[key][name] = parameter
    return [
        {"params": [*named.values()], "names": [*named], "weight_decay": decay, "algorithm": algorithm}
        for (algorithm, decay), named in members.items()
        if named
    ]


def rule(name: str, shape: tuple[int, ...], config: Any, section: OptimSection) -> tuple[str, float]:
    """``(algorithm, weight decay)`` of one parameter."""
    if section.kind == "muon" and matrices(name, shape, config) is not None:
        return "muon", section.weight_decay
    return "adamw", section.weight_decay if len(shape) >= 2 else 0.0


def _is_deepseek_v4(config: Any) -> bool:
    return getattr(config, "model_type", None) == "deepseek_v4"


def _expert_heights(leaf: str, shape: tuple[int, ...], config: Any) -> list[int]:
    """Rows of each matrix of stacked experts: of every expert one, or its gate and up projections apart.

    Other models interleave or transpose their ``gate_up_proj``, so there an expert's stays one matrix.
    """
    experts, rows = shape[:2]
    if leaf == "gate_up_proj" and _is_deepseek_v4(config):
        return [rows // 2] * (2 * experts)
    return [rows] * experts


def _deepseek_v4_heights(leaf: str, parent: str, rows: int, config: Any) -> list[int]:
    """Rows of each matrix of a 2-D parameter of DeepSeek-V4."""
    if leaf == "o_a_proj":  # one projection a group of heads
        return [rows // config.o_groups] * config.o_groups
    if leaf in ("kv_proj", "gate_proj") and parent in ("compressor", "indexer"):
        # CSA pools two series of entries, HCA one (TR §2.3.1-2); each has its own values and gates.
        width = config.index_head_dim if parent == "indexer" else config.head_dim
        return [width] * (rows // width)
    if leaf == "fn":  # n(n + 2) rows: of the pre, the post and the residual mapping (TR §2.2)
        n = isqrt(rows + 1) - 1
        return [n, n, n * n]
    return [rows]
