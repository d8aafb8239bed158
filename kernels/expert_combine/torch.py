"""Sums of tokens' rows as a gather, so that they are deterministic. Legend as in ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import apply


class _Combine(torch.autograd.Function):
    """The gradient of a token goes to all its rows."""

    @staticmethod
    def forward(ctx, rows_MD, order_M, k):
        ctx.save_for_backward(order_M)
        ctx.k = k
        return sum_of_token(rows_MD, order_M, k)

    @staticmethod
    def backward(ctx, grad_ND):
        (order_M,) = ctx.saved_tensors
        return grad_ND.index_select(0, order_M // ctx.k), None, None


def sum_of_token(rows_MD: Tensor, order_M: Tensor, k: int) -> Tensor:
    """``[N, D]`` from rows in order of experts: a gather, so deterministic, summed in at least fp32."""
    place_M = torch.empty_like(order_M)
    place_M.scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    return rows_MD.index_select(0, place_M).view(-1, k, rows_MD.shape[1]).sum(1)


def expert_combine(rows_MD: Tensor, order_M: Tensor, k: int) -> Tensor:
    """See ``reference.expert_combine``."""
    return apply(_Combine, rows_MD, order_M, k)
