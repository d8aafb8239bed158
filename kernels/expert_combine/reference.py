"""The sum of each token's rows, which lie in order of experts: what comes back from where the experts are.

Legend: N tokens, D model, k experts of a token, M = N·k assignments.
"""

from __future__ import annotations

from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype


def expert_combine(rows_MD: Tensor, order_M: Tensor, k: int) -> Tensor:
    """``[N, D]``, summed in fp32: row i belongs to assignment ``order_M[i]``; assignment n·k + j is token n's j-th.

    ``order_M`` is the permutation that ``expert_dispatch`` got.
    """
    full = rows_MD.to(full_dtype(rows_MD))
    zeros_ND = full.new_zeros(len(order_M) // k, full.shape[1])
    return zeros_ND.index_add(0, order_M // k, full).to(rows_MD.dtype)
