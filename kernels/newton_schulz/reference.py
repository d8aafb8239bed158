"""Hybrid Newton-Schulz iteration (TR §2.4, eq. 28): the orthogonal factor U Vᵀ of each matrix U Σ Vᵀ.

Legend: B matrices of one shape, N rows, M columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype

FAST = (
    3.4445,
    -4.7750,
    2.0315,
)  # steep at zero: small singular values grow, large ones end between 0.7 and 1.2
SETTLING = (2.0, -1.5, 0.5)  # p(1) = 1 and p'(1) = 0: what is near 1 goes to 1
SETTLING_STEPS = 2


def coefficients(steps: int) -> list[tuple[float, float, float]]:
    """``(a, b, c)`` of each step: fast ones, the last two settling.

    Raises:
        ValueError: fewer steps than the settling ones.
    """
    if steps < SETTLING_STEPS:
        raise ValueError(f"newton_schulz: steps={steps}, but the last {SETTLING_STEPS} settle; give more.")
    return [FAST] * (steps - SETTLING_STEPS) + [SETTLING] * SETTLING_STEPS


def unit_norm(g_BNM: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm, in fp32 (fp64 stays); a zero matrix stays zero.

    Divided by its largest element first: squares of a gradient below 1e-19 are zero in fp32, above 1e19 infinite.
    """
    x_BNM = g_BNM.to(full_dtype(g_BNM))
    for order in (float("inf"), 2.0):
        size = torch.linalg.vector_norm(x_BNM, order, dim=(-2, -1), keepdim=True)
        x_BNM = x_BNM / size.masked_fill(size == 0, 1.0)
    return x_BNM


def newton_schulz(g_BNM: Tensor, *, steps: int = 10) -> Tensor:
    """``[B, N, M]`` to matrices with the same singular vectors and all singular values 1, in the dtype of g.

    Args:
        steps: 10 bring singular values from 3e-5 of the matrix's norm up to within 1% of 1; smaller ones end below.
    """
    tall = g_BNM.shape[-2] > g_BNM.shape[-1]
    x = unit_norm(g_BNM.mT if tall else g_BNM)
    for a, b, c in coefficients(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g_BNM.dtype)
