"""Random inputs of the window pooling. Legend: B rows, T tokens, C entries, K entry dimension, m rate, F = K or 2K."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._cases import SMALL, Case, between, normal, packed, whole

VARIANTS = tuple(
    {"rate": rate, "overlap": overlap, "single": single}
    for rate, overlap in ((4, True), (3, False), (8, True), (50, True))  # 50: hardly a window, or none
    for single in (False, True)
)


def case(g: torch.Generator, size: str, *, rate: int = 4, overlap: bool = True, single: bool = False) -> Case:
    B, T, K = (between(g, 1, 3), between(g, 20, 60), between(g, 1, 6)) if size == SMALL else (2, 1024, 128)
    F = 2 * K if overlap else K
    rows = whole(B, T) if single else packed(g, B, T, T // 2 if size == SMALL else 500)
    inputs = {
        "kv_BTF": normal(g, B, T, F),
        "gate_BTF": normal(g, B, T, F),
        "bias_mF": normal(g, rate, F),
    }
    options = {"geometry": rows, "rate": rate, "overlap": overlap}
    shape = {"B": B, "T": T, "F": F, "m": rate}
    return Case(inputs, options, tuple(inputs), view=seen_entries, shape=shape)


def seen_entries(outputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Slots past a row's last entry hold what they like, as long as it is finite."""
    (entries_BCK,) = outputs
    entries = arguments["geometry"].entries(arguments["rate"])
    count_B1 = (entries.first_BT + entries.visible_BT).amax(1, keepdim=True)
    used_BC = torch.arange(entries.count) < count_B1
    return (entries_BCK * used_BC[..., None],)
