"""Random inputs of the window pooling. Legend: B rows, T tokens, C entries, K entry dimension, m rate, F = K or 2K."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._cases import SMALL, Case, between, normal, packed, part_of, whole
from kernels.row_part import RowPart

VARIANTS = tuple(
    {"rate": rate, "overlap": overlap, "single": single}
    for rate, overlap in ((4, True), (3, False), (8, True), (50, True))  # 50: hardly a window, or none
    for single in (False, True)
) + tuple(
    {"rate": rate, "overlap": overlap, "single": single, "ranks": 3}
    for rate, overlap in ((4, True), (3, False))
    for single in (False, True)
)


def case(
    g: torch.Generator,
    size: str,
    *,
    rate: int = 4,
    overlap: bool = True,
    single: bool = False,
    ranks: int = 1,
) -> Case:
    B, T, K = (between(g, 1, 3), between(g, 20, 60), between(g, 1, 6)) if size == SMALL else (2, 1024, 128)
    T = T if ranks == 1 else ranks * between(g, 2 * rate, 20)
    F = 2 * K if overlap else K
    rows = whole(B, T) if single else packed(g, B, T, T // 2 if size == SMALL else 500)
    inputs = {
        "kv_BTF": normal(g, B, T, F),
        "gate_BTF": normal(g, B, T, F),
        "bias_mF": normal(g, rate, F),
    }
    options = {"geometry": rows, "rate": rate, "overlap": overlap}
    shape = {"B": B, "T": T, "F": F, "m": rate}
    made = Case(inputs, options, tuple(inputs), view=seen_entries, shape=shape)
    return made if ranks == 1 else part_of(made, g, ranks, 2 * rate, (), ("kv_BTF", "gate_BTF"))


def seen_entries(outputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Slots past a row's last entry hold what they like, as long as it is finite."""
    (entries_BCK,) = outputs
    geometry, rate = arguments["geometry"], arguments["rate"]
    if geometry.before:
        return (entries_BCK * _put_in_order(geometry, rate)[..., None],)
    entries = geometry.entries(rate)
    count_B1 = (entries.first_BT + entries.visible_BT).amax(1, keepdim=True)
    used_BC = torch.arange(entries.count) < count_B1
    return (entries_BCK * used_BC[..., None],)


def _put_in_order(part: RowPart, rate: int) -> Tensor:
    """Which of a part's slots are entries of the row, ``[B, c]``."""
    windows = part.windows(rate)
    used = torch.zeros(part.B * part.ranks * windows.count + 1)
    used[windows.order] = 1.0
    used_BRc = used[:-1].view(part.B, part.ranks, windows.count)
    used_BRc[:, :, 0] = 0.0  # the entry before the part's first; all that is none points to one of them
    return used_BRc[:, part.rank]
