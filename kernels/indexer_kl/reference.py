"""The loss that trains the lightning indexer: ``KL(p_t ‖ softmax I_t)`` (V3.2 report §2.1; V4 TR §4.2.2).

The target p_t is the main attention's mass on the selected entries, summed over heads and normalised over them (so
window and sink take no part); the softmax of the scores is over the same entries. Queries without an entry, and
padding, are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels.geometry import Geometry
from kernels.indexer_select.reference import scores


def indexer_kl(
    q_BTHK: Tensor,
    keys_BCK: Tensor,
    weights_BTH: Tensor,
    mass: Tensor,
    geometry: Geometry,
    *,
    rate: int,
    selected_BTS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the KL over queries and the number of queries, both fp32 scalars.

    ``mass`` is ``[B, T, S]`` at ``selected_BTS`` (row-local indices, -1 = none), or ``[B, T, C]`` without a selection.
    Gradients go to q, keys and weights.
    """
    scores_BTC = scores(q_BTHK, keys_BCK, weights_BTH, geometry, rate)
    counted_BT = (geometry.entries(rate).visible_BT > 0) & geometry.real_BT
    if selected_BTS is not None and scores_BTC.shape[-1]:
        scores_BTC = scores_BTC.gather(2, selected_BTS.clamp(min=0)).masked_fill(
            selected_BTS < 0, float("-inf")
        )
    log_model = scores_BTC[counted_BT].log_softmax(-1)
    target = mass.to(log_model.dtype)[counted_BT]
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-30)
    kept = target > 0
    terms = torch.where(kept, target, 1).log() - torch.where(kept, log_model, 0)
    return (terms * target).sum(), counted_BT.sum().to(log_model.dtype)
