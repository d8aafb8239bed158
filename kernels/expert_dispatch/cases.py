"""Random assignments of tokens to experts. Legend: N tokens, D model, E experts, k experts of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._cases import SMALL, Case, between, normal


def case(g: torch.Generator, size: str) -> Case:
    N, D, k, order_M = assignments(g, size)
    return Case(
        {"x_ND": normal(g, N, D)}, {"order_M": order_M, "k": k}, ("x_ND",), shape={"N": N, "D": D, "k": k}
    )


def assignments(g: torch.Generator, size: str) -> tuple[int, int, int, Tensor]:
    """N, D, k and the order of the assignments by expert."""
    if size == SMALL:
        N, D, E = between(g, 1, 24), between(g, 1, 24), between(g, 2, 8)
        k = between(g, 1, E)
    else:
        N, D, E, k = 2048, 512, 64, 6
    experts_Nk = torch.rand(N, E, generator=g).argsort(1)[:, :k]
    return N, D, k, experts_Nk.reshape(-1).argsort(stable=True)
