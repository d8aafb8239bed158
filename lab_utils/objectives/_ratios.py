"""Arithmetic of policy gradients on log-probabilities: ratios, their clipping, estimators of a KL, means by document.

Everything is elementwise on fp32 [B, T] (B rows, T tokens; D documents of a row), so that objectives read as formulas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lab_utils.data.rows import PackedRows
from lab_utils.objectives._logps import document_sums

# |log-ratio| in nat that exponentials are held to: e^20 leaves room in fp32, and beyond it no step is worth taking.
LARGEST = 20.0


def ratio(log_ratio: Tensor) -> Tensor:
    """``exp(log_ratio)``, constant (so without gradient) beyond ±``LARGEST``: an overflow times 0 would be NaN."""
    return log_ratio.clamp(-LARGEST, LARGEST).exp()


def clipped_gain(
    ratio_BT: Tensor, advantages_BT: Tensor, low: float, high: float, dual: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a token gains: ``min(u·A, clip(u, 1 - low, 1 + high)·A)``, and where A < 0 no less than ``dual·A``.

    Source: PPO (arXiv 1707.06347 eq. 7), bounds of two sizes (DAPO, 2503.14476 §3.1), dual clip (1912.09729).

    Returns:
        The gain; bool, where the lower bound binds (u < 1 - low, A < 0); bool, where the upper does (u > 1 + high,
        A > 0). Between them lies what takes part in the gradient, the dual bound aside.
    """
    bounded_BT = ratio_BT.clamp(1 - low, 1 + high)
    gain_BT = torch.minimum(ratio_BT * advantages_BT, bounded_BT * advantages_BT)
    negative_BT = advantages_BT < 0
    if dual is not None:
        gain_BT = torch.where(negative_BT, torch.maximum(gain_BT, dual * advantages_BT), gain_BT)
    return gain_BT, (ratio_BT < 1 - low) & negative_BT, (ratio_BT > 1 + high) & (advantages_BT > 0)


def kl_estimate(kind: str, logps: Tensor, reference: Tensor, log_ratio: Tensor) -> Tensor:
    """An estimate of KL(π ‖ π_ref) at each sampled token, with the gradient of its own formula.

    With v = π_ref/π: k1 = -log v; k2 = (log v)²/2; k3 = v - 1 - log v (Schulman 2020, joschu.net/blog/kl-approx.html);
    unbiased = u·k3 with u = π/π_old and its gradient (DeepSeek-V3.2 §3.1). On samples of π the values of all but k2
    average to the KL. Their gradients average to: the KL's for k2 and ``unbiased`` (this one on samples of π_old too),
    that of KL(π_ref ‖ π) for k3, and nothing for k1, which measures and does not hold.

    Args:
        kind: k1, k2, k3 or unbiased.
        logps, reference: log π and log π_ref of the tokens, nat.
        log_ratio: log(π/π_old), read by ``unbiased`` alone.
    """
    log_v = reference - logps
    if kind == "k1":
        return -log_v
    if kind == "k2":
        return log_v.square() / 2
    k3 = ratio(log_v) - 1 - log_v
    return k3 * ratio(log_ratio) if kind == "unbiased" else k3


def document_means(x_BT: Tensor, bears_BT: Tensor, rows: PackedRows) -> Tensor:
    """Mean over the tokens of each document that bear loss, [B, D]; 0 for a document without any."""
    totals_BD = document_sums(x_BT * bears_BT, rows)
    return totals_BD / document_sums(bears_BT.to(x_BT.dtype), rows).clamp(min=1.0)


def at_tokens(x_BD: Tensor, rows: PackedRows) -> Tensor:
    """The value of each token's document, [B, T]; 0 on padding."""
    documents = x_BD.shape[1]
    bins_BT = rows.document_ids.where(rows.document_ids >= 0, documents)
    return F.pad(x_BD, (0, 1)).gather(1, bins_BT)
