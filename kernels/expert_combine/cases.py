"""Random rows of experts to sum. Legend: N tokens, D model, k experts of a token, M = N·k rows."""

from __future__ import annotations

import torch

from kernels._cases import Case, normal
from kernels.expert_dispatch.cases import assignments


def case(g: torch.Generator, size: str) -> Case:
    N, D, k, order_M = assignments(g, size)
    inputs, options = {"rows_MD": normal(g, N * k, D)}, {"order_M": order_M, "k": k}
    return Case(inputs, options, ("rows_MD",), shape={"N": N, "D": D, "k": k})
