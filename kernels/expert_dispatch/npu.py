"""Rows by expert through ``npu_moe_token_permute``, whose gradient torch_npu has.

The operator sorts assignments by a number of each, stably: given their places in the order that we want, it makes that
order. Limits (CANN's document of MoeTokenPermute): at most 512 experts a token, fewer than 2²⁴ - 1 assignments. Legend
as in ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu
from kernels.expert_dispatch.torch import expert_dispatch as by_torch

OPERATORS = ("npu::npu_moe_token_permute",)
unsupported = _npu.runs(OPERATORS)
MOST = (1 << 24) - 1


def places(order_M: Tensor, k: int) -> Tensor:
    """Where each assignment of a token stands in the order, ``[N, k]`` int32: the inverse permutation."""
    place_M = torch.empty(len(order_M), dtype=torch.int32, device=order_M.device)
    steps_M = torch.arange(len(order_M), dtype=torch.int32, device=order_M.device)
    return place_M.scatter_(0, order_M, steps_M).view(-1, k)


def limits(operator: str, rows: int, k: int) -> bool:
    """Whether dispatch or combine of so many rows has to fall back."""
    return _npu.outside(
        operator,
        (k > 512, f"it takes at most 512 experts a token, not {k}"),
        (rows >= MOST, f"it takes fewer than {MOST} assignments"),
        (not rows, "it takes no empty tensor"),
    )


def expert_dispatch(x_ND: Tensor, order_M: Tensor, k: int) -> Tensor:
    """See ``reference.expert_dispatch``."""
    if limits("expert_dispatch", len(order_M), k):
        return by_torch(x_ND, order_M, k)
    return _npu.call(OPERATORS[0], x_ND, places(order_M, k))[0]
