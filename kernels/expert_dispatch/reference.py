"""A row for each assignment of a token to an expert, in order of experts: what is sent to where the experts are.

Legend: N tokens, D model, k experts of a token, M = N·k assignments.
"""

from __future__ import annotations

from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401


def expert_dispatch(x_ND: Tensor, order_M: Tensor, k: int) -> Tensor:
    """``[M, D]``: row i is the token of assignment ``order_M[i]``; assignment n·k + j is token n's j-th.

    ``order_M`` is a permutation, as of ``experts_Nk.flatten().argsort(stable=True)``.
    """
    return x_ND[order_M // k]
