"""Random inputs of attention. Legend: B rows, T tokens, H heads, K head dimension, C entries, R rotated pairs."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal, packed, part_of
from kernels.indexer_select.reference import indexer_select

VARIANTS = (
    {"rate": 4, "topk": 64},
    {"rate": None},
    {"rate": 4},
    {"rate": 4, "topk": 3},
    {"rate": 16},
    {"rate": 100},  # more than a document: no entry at all
    {"rate": 4, "window": 64},  # query blocks of half a window
    {"rate": 4, "topk": 3, "ranks": 3},
    {"rate": 4, "window": 64, "ranks": 2},
    {"rate": 16, "ranks": 2},
)


def case(
    g: torch.Generator,
    size: str,
    *,
    rate: int | None = 4,
    topk: int | None = None,
    window: int | None = None,
    ranks: int = 1,
) -> Case:
    if size == SMALL:
        B, T, H, R = between(g, 1, 3), between(g, 20, 60), between(g, 1, 3), between(g, 1, 3)
        T = T + 100 if window else T
        T = T if ranks == 1 else ranks * ((window or 20) + between(g, 0, 30))
        K, window = 2 * R + 2 * between(g, 0, 3), window or between(g, 1, 9)
        rows = packed(g, B, T, max(20, 2 * T // 3))
    else:
        B, T, H, K, R, window = 1, 1024, 8, 64, 16, 128
        rows = packed(g, B, T, 700)
    geometry, angle = rows.geometry(), normal(g, B, T, R)
    inputs = {"q_BTHK": normal(g, B, T, H, K), "kv_BTK": normal(g, B, T, K), "sinks_H": normal(g, H)}
    options = {
        "cos_BTR": angle.cos(),
        "sin_BTR": angle.sin(),
        "geometry": rows,
        "window": window,
        "eps": 1e-6,
    }
    seen_BT = (geometry.local_BT + 1).clamp(max=window)
    if rate:
        inputs["entries_BCK"] = normal(g, B, T // rate, K)
        options |= {"rate": rate, "want_mass": rate <= T}  # without an entry there is no mass to speak of
        visible_BT = geometry.entries(rate).visible_BT
        seen_BT = seen_BT + (visible_BT if topk is None else visible_BT.clamp(max=topk))
    if topk:
        index = normal(g, B, T, 2, 4), normal(g, B, T // rate, 4), normal(g, B, T, 2)
        options["selected_BTS"] = indexer_select(*index, geometry, rate=rate, topk=topk)
    # Scores and values forward; their four gradients backward.
    flops = 6 * 2 * int(seen_BT.sum()) * H * K
    shape = {"B": B, "T": T, "H": H, "K": K, "window": window}
    made = Case(inputs, options, tuple(inputs), flops=flops, shape=shape)
    if ranks == 1:
        return made
    before = window + between(g, 0, min(9, T // ranks - window))  # of which the operator leaves some alone
    return part_of(made, g, ranks, before, ("q_BTHK", "cos_BTR", "sin_BTR", "selected_BTS"), ("kv_BTK",))
