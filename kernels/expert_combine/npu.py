"""Sums of tokens' rows through ``npu_moe_token_unpermute``, whose gradient torch_npu has.

Without weights of the experts it only puts rows back; weights of one make it add the k rows of a token. Limits as in
``expert_dispatch``; it does not say in which dtype it adds. Legend as in ``reference``.
"""

from __future__ import annotations

from torch import Tensor

from kernels import _npu
from kernels.expert_combine.torch import expert_combine as by_torch
from kernels.expert_dispatch.npu import limits, places

OPERATORS = ("npu::npu_moe_token_unpermute",)
unsupported = _npu.runs(OPERATORS)


def expert_combine(rows_MD: Tensor, order_M: Tensor, k: int) -> Tensor:
    """See ``reference.expert_combine``."""
    if limits("expert_combine", len(order_M), k):
        return by_torch(rows_MD, order_M, k)
    ones_Nk = rows_MD.new_ones(len(order_M) // k, k)
    return _npu.call(OPERATORS[0], rows_MD, places(order_M, k).view(-1), probs=ones_Nk)
