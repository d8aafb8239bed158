"""Random inputs of the way in. Legend: N tokens, n streams, D model."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal

VARIANTS = ({"n": 4}, {"n": 2})


def case(g: torch.Generator, size: str, *, n: int = 4) -> Case:
    N, D, iterations = (between(g, 1, 20), between(g, 1, 24), 5) if size == SMALL else (2048, 256, 20)
    inputs = {
        "h_NnD": normal(g, N, n, D),
        "fn": normal(g, n * (n + 2), n * D) / 4,
        "base": normal(g, n * (n + 2)),
        "scale": normal(g, 3),
    }
    options = {"iterations": iterations, "eps": 1e-6, "norm_eps": 1e-6}
    # Products with fn, and the weighted sum of the streams: once forward, twice backward.
    flops = 3 * 2 * N * n * D * (n * (n + 2) + 1)
    return Case(inputs, options, tuple(inputs), flops=flops, shape={"N": N, "n": n, "D": D})
