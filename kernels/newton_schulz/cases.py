"""Random inputs of the orthogonalisation. Legend: B matrices of one shape, N rows, M columns.

Singular values lie between 0.3 and 1, so that the factor is well determined in bf16 too.
"""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal


def case(g: torch.Generator, size: str) -> Case:
    B, N, M = (between(g, 1, 4), between(g, 1, 40), between(g, 1, 40)) if size == SMALL else (2, 128, 384)
    k, steps = min(N, M), 10
    left, right = torch.linalg.qr(normal(g, B, N, k)).Q, torch.linalg.qr(normal(g, B, M, k)).Q
    sigma = torch.rand(B, 1, k, generator=g, dtype=torch.float64) * 0.7 + 0.3
    flops = steps * 2 * B * (2 * k * N * M + k**3)
    return Case(
        {"g_BNM": (left * sigma) @ right.mT},
        {"steps": steps},
        flops=flops,
        low_on_devices=True,
        shape={"B": B, "N": N, "M": M},
    )
