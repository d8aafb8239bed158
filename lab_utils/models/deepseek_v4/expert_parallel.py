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

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels._support import count
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
    counts_PL = count(experts_Nk.reshape(-1), P * L).view(P, L)
    arriving_PL = torch.empty_like(counts_PL)
    dist.all_to_all_single(arriving_PL, counts_PL, group=group)
    sent, received = torch.stack([counts_PL.sum(1), arriving_PL.sum(1)]).tolist()  # the one wait of the host

    rows_MD = operator("expert_dispatch", x_ND)(x_ND, order_M, k)
    rows_RD = _AllToAll.apply(rows_MD, received, sent, group)
    share_M1 = weights_Nk.reshape(-1, 1).index_select(0, order_M)
    share_R1 = _AllToAll.apply(share_M1, received, sent, group)
    # Rows arrive by source, and within a source by expert.
    expert_L = torch.arange(L, device=x_ND.device).repeat(P)
    expert_R1 = torch.repeat_interleave(expert_L, arriving_PL.flatten(), output_size=sum(received))[:, None]
    run = operator("grouped_swiglu", x_ND)
    out_RD = run(rows_RD, expert_R1, share_R1, gate_up_LGD, down_LDF, limit)
    rows_MD = _AllToAll.apply(out_RD, sent, received, group)
    return operator("expert_combine", rows_MD)(rows_MD, order_M, k)


class Beside:
    """Work on a stream of its own while this one waits for other ranks; without streams it runs at once.

    Autograd runs a backward pass on the stream of its forward pass and orders the two by itself.

    Args:
        device: of the tensors.
        wanted: False runs at once on any device.
    """

    def __init__(self, device: torch.device, wanted: bool) -> None:
        module = getattr(torch, device.type, None) if wanted else None
        self._module = module if hasattr(module, "Stream") and device.type != "cpu" else None
        if self._module is not None:
            self._stream = _streams.get(device) or _streams.setdefault(device, module.Stream(device))

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, of which nothing may be read before ``wait``."""
        if self._module is None:
            return function(x)
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            y = function(x)
        x.record_stream(
            self._stream
        )  # memory that goes free here is not to be given away under the other stream
        return y

    def wait(self, y: Tensor) -> Tensor:
        """The result, for this stream to read."""
        if self._module is not None:
            self._module.current_stream().wait_stream(self._stream)
            y.record_stream(self._module.current_stream())
        return y


_streams: dict[torch.device, Any] = {}


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
