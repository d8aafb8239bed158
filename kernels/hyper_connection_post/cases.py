"""Random inputs of the way out. Legend: N tokens, n streams, D model."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal

VARIANTS = ({"n": 4}, {"n": 2})


def case(g: torch.Generator, size: str, *, n: int = 4) -> Case:
    N, D = (between(g, 1, 20), between(g, 1, 24)) if size == SMALL else (2048, 256)
    inputs = {
        "h_NnD": normal(g, N, n, D),
        "y_ND": normal(g, N, D),
        "post_Nn": normal(g, N, n),
        "comb_Njk": normal(g, N, n, n),
    }
    flops = 3 * 2 * N * n * D * (n + 1)
    wide = ("post_Nn", "comb_Njk")
    return Case(inputs, {}, tuple(inputs), wide, flops=flops, shape={"N": N, "n": n, "D": D})
