"""Context parallelism: the tokens of a row over the ranks of a group, in runs of equal length.

What a run needs of the others travels by three exchanges: the tokens just before it (keys of its first queries), small
compressed entries of the whole row, and the experts' load by documents that go on in other runs. Each rank's gradients
are those of its own tokens; the engine sums them over ranks as it sums those of different rows.

Legend: B rows, T tokens of a run, n tokens before it, D any width, R ranks of the group, c and C entries of a run and
of the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lab_utils import collectives


@dataclass(frozen=True)
class ContextParallel:
    """This rank's place among those that share rows: ``rank`` of ``ranks``, in order of the tokens."""

    group: Any
    rank: int
    ranks: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> ContextParallel:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def cut(self, x_BT: Tensor) -> Tensor:
        """The run of this rank of a tensor whose second dimension is the row's tokens."""
        T = x_BT.shape[1] // self.ranks
        return x_BT[:, self.rank * T : (self.rank + 1) * T]

    def with_before(self, x_BTD: Tensor, n: int) -> Tensor:
        """``[B, n + T, D]``: the last n tokens of the rank before in front; zeros in the first rank."""
        return _WithBefore.apply(x_BTD, n, self)

    def of_row(self, x_BcD: Tensor, order: Tensor, count: int) -> Tensor:
        """``[B, C, D]`` of all ranks' ``[B, c, D]``; ``order [B·C]`` says which of ``[B·R·c]`` comes where."""
        return _OfRow.apply(x_BcD, order, count, self)

    def gathered(self, x: Tensor) -> Tensor:
        """``[R, …]`` of all ranks' equal ``[…]``, without a gradient."""
        x = x.contiguous()
        out = x.new_empty(self.ranks, *x.shape)
        collectives.all_gather(out.flatten(0, 1), x, group=self.group)
        return out


class _WithBefore(torch.autograd.Function):
    """One uneven all-to-all, in which a rank sends to the next alone; the gradient goes to the one before."""

    @staticmethod
    def forward(ctx, x_BTD, n, parts):
        ctx.n, ctx.parts = n, parts
        tail = x_BTD[:, x_BTD.shape[1] - n :]
        return torch.cat([_passed_on(tail, parts, 1), x_BTD], 1)

    @staticmethod
    def backward(ctx, grad):
        n, parts = ctx.n, ctx.parts
        back = _passed_on(grad[:, :n], parts, -1)
        grad = grad[:, n:].clone()
        grad[:, grad.shape[1] - n :] += back
        return grad, None, None


def _passed_on(x: Tensor, parts: ContextParallel, by: int) -> Tensor:
    """What the rank ``by`` places back holds as ``x``; zeros where there is none."""
    source, target, size = parts.rank - by, parts.rank + by, x.numel()
    sent = [size if rank == target else 0 for rank in range(parts.ranks)]
    received = [size if rank == source else 0 for rank in range(parts.ranks)]
    own = x.reshape(-1) if sum(sent) else x.new_empty(0)
    out = x.new_empty(sum(received))
    dist.all_to_all_single(out, own, received, sent, group=parts.group)
    return out.view(x.shape) if sum(received) else torch.zeros_like(x)


class _OfRow(torch.autograd.Function):
    """All-gather, put in order; the gradient is summed over ranks in fp32 at least."""

    @staticmethod
    def forward(ctx, x_BcD, order, count, parts):
        ctx.save_for_backward(order)
        ctx.parts, ctx.shape = parts, x_BcD.shape
        B, _, D = x_BcD.shape
        held = parts.gathered(x_BcD).transpose(0, 1).reshape(-1, D)
        return held.index_select(0, order).view(B, count, D)

    @staticmethod
    def backward(ctx, grad):
        (order,), parts, (B, c, D) = ctx.saved_tensors, ctx.parts, ctx.shape
        full = torch.promote_types(grad.dtype, torch.float32)
        held = torch.zeros(B * parts.ranks * c, D, dtype=full, device=grad.device)
        # Places that stand for no entry all point to the first slot, with a gradient of zero.
        held.index_add_(0, order, grad.reshape(-1, D).to(full))
        held = held.view(B, parts.ranks, c, D).transpose(0, 1).contiguous()
        own = held.new_empty(B, c, D)
        collectives.reduce_scatter(own, held.flatten(0, 1), group=parts.group)
        return own.to(grad.dtype), None, None, None
