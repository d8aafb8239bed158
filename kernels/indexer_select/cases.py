"""Random inputs of the selection. Legend: B rows, T tokens, C entries, H indexer heads, K dimension, S selected.

Queries and keys are small whole numbers, so that every dot product is exact in every dtype: which entries no head
likes, scored exactly zero and taken in order of their place, is then the same for every implementation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._cases import SMALL, Case, between, normal, packed, part_of, visible_entries
from kernels.indexer_select.reference import scores

VARIANTS = ({"topk": 64}, {"topk": 5}, {"topk": 1}, {"topk": 5, "ranks": 3})


def case(g: torch.Generator, size: str, *, topk: int = 64, rate: int = 4, ranks: int = 1) -> Case:
    if size == SMALL:
        B, T, H, K = between(g, 1, 2), between(g, 3, 200), between(g, 1, 4), between(g, 2, 6)
    else:
        B, T, H, K = 1, 1024, 8, 64
    T = T if ranks == 1 else ranks * between(g, 2 * rate, 70)
    rows = packed(g, B, T, max(2, 7 * T // 8))
    inputs = {
        "q_BTHK": torch.randint(-3, 4, (B, T, H, K), generator=g).double(),
        "keys_BCK": torch.randint(-3, 4, (B, T // rate, K), generator=g).double(),
        "weights_BTH": normal(g, B, T, H),
    }
    options = {"geometry": rows, "rate": rate, "topk": topk}
    flops = 2 * int(rows.geometry().entries(rate).visible_BT.sum()) * H * (K + 1)
    shape = {"B": B, "T": T, "H": H, "K": K, "topk": topk}
    made = Case(inputs, options, view=selection, flops=flops, shape=shape)
    return made if ranks == 1 else part_of(made, g, ranks, 2 * rate, ("q_BTHK", "weights_BTH"))


def selection(outputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """``(faults, zeros)``: how much is wrong with a selection, and which entries of score zero are in it.

    Entries of one score may take each other's place, except at zero, where the earlier one must win.
    """
    (selected_BTS,) = outputs
    q, keys, weights = (arguments[name] for name in ("q_BTHK", "keys_BCK", "weights_BTH"))
    rate, geometry, C, S = arguments["rate"], arguments["geometry"], keys.shape[1], selected_BTS.shape[2]
    scores_BTC = scores(q, keys, weights, geometry, rate)
    place_BTS = torch.where(selected_BTS < 0, C, selected_BTS)
    count_BTC = torch.zeros(*scores_BTC.shape[:2], C + 1, dtype=torch.long)
    count_BTC.scatter_add_(2, place_BTS, torch.ones_like(place_BTS))
    visible_BTC = visible_entries(geometry, rate)
    repeated_or_unseen = (count_BTC[..., :C] > visible_BTC).sum()
    left_out = (count_BTC[..., C] - (S - visible_BTC.sum(2)).clamp(min=0)).abs().sum()
    scores_BTC = scores_BTC.masked_fill(~visible_BTC, -1e6)
    chosen_BTS = F.pad(scores_BTC, (0, 1), value=-1e6).gather(2, place_BTS).sort(descending=True).values
    worse = (scores_BTC.topk(S).values - chosen_BTS > 1e-5).sum()
    zeros_BTC = (count_BTC[..., :C] > 0) & (scores_BTC == 0)
    return (repeated_or_unseen + left_out + worse).double(), zeros_BTC.double()
