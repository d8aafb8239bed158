"""Balance of the experts' load: V3's sequence-wise loss, and the correction bias that moves without a gradient.

V4 trained with both (TR §4.2: bias speed 0.001, loss weight 1e-4); their formulas are V3's (its report, §2.1.2).

Legend: B rows, T tokens, N = B·T, E experts, k experts of a token, L layers with a learned router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lab_utils.telemetry.reductions import Max, Mean, Metric

if TYPE_CHECKING:
    from lab_utils.models.deepseek_v4.layers import Context
    from lab_utils.models.deepseek_v4.moe import Router


def sequence_balance(scores_NE: Tensor, experts_Nk: Tensor, context: Context) -> Tensor:
    """``Σ over documents of Σ_e f_e · P_e``, an fp32 scalar; 1 for each document whose load is even.

    In a document of L counted tokens, ``f_e = E/(k·L) · tokens of e`` over the experts that were chosen, without a
    gradient, and ``P_e`` is the mean of score / sum of scores. Documents of a row never mix.

    Args:
        scores_NE: scores of all experts, before any bias.
        context: says where documents lie, and which tokens count.
    """
    geometry, counted = context.geometry, context.counted_BT[..., None]
    (B, T), E = counted.shape[:2], scores_NE.shape[1]
    chosen_BTE = torch.zeros(B * T, E, dtype=torch.int32, device=scores_NE.device)
    chosen_BTE = chosen_BTE.scatter_(1, experts_Nk, 1).view(B, T, E) * counted
    # A document's load at each of its tokens, from running sums over the row: whole numbers, so exact in any order.
    sums_BTE = chosen_BTE.cumsum(1, dtype=torch.int32)
    first_BT = geometry.start_BT.clamp(min=0)
    last_BT = (geometry.start_BT + geometry.length_BT - 1).clamp(max=T - 1)
    load_BTE = sums_BTE.gather(1, last_BT[..., None].expand(-1, -1, E))
    load_BTE -= (sums_BTE - chosen_BTE).gather(1, first_BT[..., None].expand(-1, -1, E))
    if context.parts is not None:
        _add_other_runs(load_BTE, context)
    length_BT1 = (geometry.length_BT - context.tail).clamp(min=1)[..., None].to(scores_NE.dtype)
    factor_BT1 = counted * (E / experts_Nk.shape[1]) / length_BT1.square()
    factor_NE = (load_BTE * factor_BT1).view(-1, E)
    return (scores_NE / scores_NE.sum(-1, keepdim=True) * factor_NE).sum()


@torch.no_grad()
def _add_other_runs(load_BTE: Tensor, context: Context) -> None:
    """Complete the load of documents that began before this rank's run of the rows, or go on after it.

    Each run tells the load, within it, of the document at its first token and of the one at its last.
    """
    geometry, parts, T = context.geometry, context.parts, load_BTE.shape[1]
    edges_RB2E = parts.gathered(load_BTE[:, [0, -1]])
    run_RB = torch.arange(parts.ranks, device=load_BTE.device)[:, None]
    end_BT = geometry.start_BT + geometry.length_BT
    begun_B = (
        geometry.start + geometry.start_BT[:, 0]
    ) // T  # the run in which the first token's document began
    ended_B = (geometry.start + end_BT[:, -1] - 1) // T
    before_RB = (run_RB >= begun_B) & (run_RB < parts.rank)
    after_RB = (run_RB > parts.rank) & (run_RB <= ended_B)
    # In a run that a document fills, both of its edges are the document's.
    before_BE = (edges_RB2E[:, :, 1] * before_RB[..., None]).sum(0, dtype=load_BTE.dtype)
    after_BE = (edges_RB2E[:, :, 0] * after_RB[..., None]).sum(0, dtype=load_BTE.dtype)
    load_BTE += before_BE[:, None] * (geometry.start_BT < 0)[..., None]
    load_BTE += after_BE[:, None] * (end_BT > T)[..., None]


@torch.no_grad()
def settle_load(
    routers: Sequence[Router], all_reduce: Callable[[Tensor], Tensor], *, rate: float
) -> dict[str, Metric]:
    """Sum the load over ranks, move the biases, clear the counts; once an optimizer step.

    ``bias += rate · sign(mean load - load)`` in each layer, over the batch of all ranks (V3 report, §2.1.2; rate 0
    leaves the biases as they are).

    Args:
        routers: those that have learned to route, in the model's order; the same on every rank.
        all_reduce: sums an int64 tensor over the ranks that share the batch, and returns it. Called once.

    Returns:
        ``moe/…`` of the global batch, the same on every rank (see ``telemetry.names``).
    """
    if not routers:
        return {}
    load_LE = all_reduce(torch.stack([router.load_E for router in routers]))
    # sign(mean - load) in whole numbers: an expert that is exactly at the mean stays.
    move_LE = (load_LE.sum(1, keepdim=True) - load_LE.shape[1] * load_LE).sign()
    for router, move_E in zip(routers, move_LE, strict=True):
        if rate:
            router.e_score_correction_bias.add_(move_E.float(), alpha=rate)
        router.load_E.zero_()
    return _metrics(load_LE.float(), torch.stack([router.e_score_correction_bias for router in routers]))


def _metrics(load_LE: Tensor, bias_LE: Tensor) -> dict[str, Metric]:
    L, E = load_LE.shape
    mean_L = load_LE.mean(1).clamp(min=1e-30)
    cv_L = load_LE.std(1, correction=0) / mean_L
    share_LE = load_LE / (E * mean_L[:, None])
    entropy_L = -torch.xlogy(share_LE, share_LE).sum(1)
    return {
        "moe/cv_mean": Mean(cv_L.sum(), L),
        "moe/cv_max": Max(cv_L.max()),
        "moe/max_violation": Max((load_LE.amax(1) / mean_L).max() - 1),
        "moe/dead_expert_frac_mean": Mean((load_LE == 0).float().sum(), L * E),
        "moe/expert_diversity_mean": Mean(entropy_L.exp().sum() / E, L),
        "moe/bias_norm": Mean(bias_LE.norm(dim=1).sum(), L),
    }
