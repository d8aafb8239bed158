"""Rows by expert, whose gradient is a gather and a sum in a fixed order. Legend as in ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import apply
from kernels.expert_combine.torch import sum_of_token


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, order_M, k):
        ctx.save_for_backward(order_M)
        ctx.k = k
        return x_ND.index_select(0, order_M // k)

    @staticmethod
    def backward(ctx, grad_MD):
        (order_M,) = ctx.saved_tensors
        return sum_of_token(grad_MD, order_M, ctx.k), None, None


def expert_dispatch(x_ND: Tensor, order_M: Tensor, k: int) -> Tensor:
    """See ``reference.expert_dispatch``."""
    return apply(_Dispatch, x_ND, order_M, k)
