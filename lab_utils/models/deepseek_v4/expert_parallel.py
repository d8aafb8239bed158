"""Experts over the ranks of a group: tokens go to the ranks that hold their experts, and come back.

A rank holds a run of E / ep experts. Its tokens are sorted by expert, sent by an uneven all-to-all, computed as grouped
products and sent back, where the sum over a token's k experts is a gather. The host waits once a layer, for the sizes
of the all-to-all. The router's weights travel with the tokens and multiply inside the expert, so that their gradient
needs no output of another rank. Every expert takes part in the backward pass, with a zero gradient where no token came.

Gradients need no factor: the engine sums them over ranks, and an expert here has seen the tokens of its whole group.

Legend: N tokens of this rank, k experts of a token, M = N·k assignments, R rows received, D model, E experts in all,
L = E / ep experts of a rank, P ranks of the group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lab_utils.models.deepseek_v4.layers import operator


def shard_experts(parameter: torch.nn.Parameter, rank: int, ranks: int) -> tuple[int, int]:
    """Rows ``[start, stop)`` of a stacked ``[E, …]`` parameter that this rank of the group holds.

    Raises:
        ValueError: the group does not divide the experts.
    """
    experts = parameter.shape[0]
    if experts % ranks:
        raise ValueError(
            f"parallel.ep={ranks} does not divide the model's {experts} experts: use a divisor of {experts}."
        )
    share = experts // ranks
    return rank * share, (rank + 1) * share


def exchange_experts(
    x_ND: Tensor,
    experts_Nk: Tensor,
    weights_Nk: Tensor,
    gate_up_LGD: Tensor,
    down_LDF: Tensor,
    limit: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """What ``grouped_swiglu`` gives on one rank with all experts: ``[N, D]``, summed over each token's experts.

    Args:
        experts_Nk: indices into all E experts.
        gate_up_LGD, down_LDF: this rank's experts, those from ``rank · L`` on.
    """
    P, L, k = dist.get_world_size(group), gate_up_LGD.shape[0], experts_Nk.shape[1]
    order_M = experts_Nk.reshape(-1).argsort(stable=True)
    counts_PL = torch.bincount(experts_Nk.reshape(-1), minlength=P * L).view(P, L)
    arriving_PL = torch.empty_like(counts_PL)
    dist.all_to_all_single(arriving_PL, counts_PL, group=group)
    sent, received = torch.stack([counts_PL.sum(1), arriving_PL.sum(1)]).tolist()  # the one wait of the host

    rows_RD = _AllToAll.apply(_Spread.apply(x_ND, order_M, k), received, sent, group)
    share_M1 = weights_Nk.reshape(-1, 1).index_select(0, order_M)
    share_R1 = _AllToAll.apply(share_M1, received, sent, group)
    # Rows arrive by source, and within a source by expert.
    expert_L = torch.arange(L, device=x_ND.device).repeat(P)
    expert_R1 = torch.repeat_interleave(expert_L, arriving_PL.flatten(), output_size=sum(received))[:, None]
    run = operator("grouped_swiglu", x_ND)
    out_RD = run(rows_RD, expert_R1, share_R1, gate_up_LGD, down_LDF, limit)
    return _Collect.apply(_AllToAll.apply(out_RD, sent, received, group), order_M, k)


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks; the gradient takes the way back."""

    @staticmethod
    def forward(ctx, x, received, sent, group):
        ctx.received, ctx.sent, ctx.group = received, sent, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        back = grad.new_empty(sum(ctx.sent), *grad.shape[1:])
        dist.all_to_all_single(back, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return back, None, None, None


class _Spread(torch.autograd.Function):
    """A row for each assignment, in order of experts; the gradient sums a token's rows in a fixed order."""

    @staticmethod
    def forward(ctx, x_ND, order_M, k):
        ctx.save_for_backward(order_M)
        ctx.k = k
        return x_ND.index_select(0, order_M // k)

    @staticmethod
    def backward(ctx, grad_MD):
        (order_M,) = ctx.saved_tensors
        return _sum_of_token(grad_MD, order_M, ctx.k), None, None


class _Collect(torch.autograd.Function):
    """The sum of each token's rows; its gradient goes to all of them."""

    @staticmethod
    def forward(ctx, rows_MD, order_M, k):
        ctx.save_for_backward(order_M)
        ctx.k = k
        return _sum_of_token(rows_MD, order_M, k)

    @staticmethod
    def backward(ctx, grad_ND):
        (order_M,) = ctx.saved_tensors
        return grad_ND.index_select(0, order_M // ctx.k), None, None


def _sum_of_token(rows_MD: Tensor, order_M: Tensor, k: int) -> Tensor:
    """``[N, D]`` from rows in order of experts: a gather, so deterministic, summed in at least fp32."""
    place_M = torch.empty_like(order_M)
    place_M.scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    return rows_MD.index_select(0, place_M).view(-1, k, rows_MD.shape[1]).sum(1)
