"""Random inputs of the indexer's loss. Legend: B rows, T tokens, C entries, H indexer heads, K dimension."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal, packed, part_of, visible_entries
from kernels.indexer_select.reference import indexer_select

VARIANTS = (
    {"topk": 64},
    {"topk": None},
    {"topk": 5},
    {"topk": 5, "ranks": 3},
    {"topk": None, "ranks": 2},
)


def case(g: torch.Generator, size: str, *, topk: int | None = 64, rate: int = 4, ranks: int = 1) -> Case:
    if size == SMALL:
        B, T, H, K = between(g, 1, 2), between(g, 30, 200), between(g, 1, 4), between(g, 2, 6)
    else:
        B, T, H, K = 1, 1024, 8, 64
    T = T if ranks == 1 else ranks * between(g, 2 * rate, 70)
    rows = packed(g, B, T, 7 * T // 8)
    geometry = rows.geometry()
    inputs = {
        "q_BTHK": normal(g, B, T, H, K),
        "keys_BCK": normal(g, B, T // rate, K),
        "weights_BTH": normal(g, B, T, H),
    }
    # Attention has no mass where it may not look.
    mass = normal(g, B, T, T // rate).square() * visible_entries(geometry, rate)
    selected, compared = None, geometry.entries(rate).visible_BT
    if topk:
        selected, compared = (
            indexer_select(*inputs.values(), geometry, rate=rate, topk=topk),
            compared.clamp(max=topk),
        )
        mass = mass.gather(2, selected.clamp(min=0)) * (selected >= 0)
    options = {"mass": mass, "geometry": rows, "rate": rate, "selected_BTS": selected}
    # Dots forward, their two gradients backward.
    flops = 3 * 2 * int(compared.sum()) * H * (K + 1)
    shape = {"B": B, "T": T, "H": H, "K": K, "topk": topk or T // rate}
    made = Case(inputs, options, tuple(inputs), flops=flops, shape=shape)
    by_query = ("q_BTHK", "weights_BTH", "mass", "selected_BTS")
    return made if ranks == 1 else part_of(made, g, ranks, 2 * rate, by_query)
