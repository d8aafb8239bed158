"""Lightning indexer: scores of compressed entries and the top-k selection (TR §2.3.1, eq. 13-17).

Legend: B rows, T tokens, C entries, H indexer heads, K indexer dimension, S selected entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import break_ties, full_dtype
from kernels.geometry import Geometry


def scores(q_BTHK: Tensor, keys_BCK: Tensor, weights_BTH: Tensor, geometry: Geometry, rate: int) -> Tensor:
    """``I(t, i) = Σ_h w_h relu(q_h · k_i)`` in fp32 ``[B, T, C]``, -inf where t may not see entry i."""
    full = full_dtype(q_BTHK)
    dots_BTHC = torch.einsum("bthk,bck->bthc", q_BTHK.to(full), keys_BCK.to(full)).relu()
    scores_BTC = (dots_BTHC * weights_BTH.to(full)[..., None]).sum(2)
    entries, slots_C = geometry.entries(rate), torch.arange(keys_BCK.shape[1], device=q_BTHK.device)
    first, visible = entries.first_BT[..., None], entries.visible_BT[..., None]
    return scores_BTC.masked_fill((slots_C < first) | (slots_C >= first + visible), float("-inf"))


def indexer_select(
    q_BTHK: Tensor, keys_BCK: Tensor, weights_BTH: Tensor, geometry: Geometry, *, rate: int, topk: int
) -> Tensor:
    """Row-local indices of the best ``S = min(topk, C)`` visible entries ``[B, T, S]``, -1 where there are fewer.

    No gradient flows through a selection. ``weights_BTH`` carry the scales K^-½ and H^-½.
    """
    scores_BTC = break_ties(scores(q_BTHK, keys_BCK, weights_BTH, geometry, rate))
    values, selected = scores_BTC.topk(min(topk, scores_BTC.shape[-1]), -1)
    return torch.where(values == float("-inf"), -1, selected)
