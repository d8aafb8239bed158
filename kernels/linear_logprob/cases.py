"""Random inputs of the log-probabilities. Legend: N tokens, D model, V vocabulary."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal

VARIANTS = ({"chunk": None}, {"chunk": 3})


def case(g: torch.Generator, size: str, *, chunk: int | None = None) -> Case:
    N, D, V = (between(g, 1, 20), between(g, 1, 12), between(g, 2, 40)) if size == SMALL else (256, 256, 8192)
    inputs = {"hidden_ND": normal(g, N, D), "weight_VD": normal(g, V, D) * (1 if size == SMALL else D**-0.5)}
    options = {"targets_N": torch.randint(0, V, (N,), generator=g), "chunk": chunk}
    return Case(inputs, options, tuple(inputs), flops=3 * 2 * N * D * V, shape={"N": N, "D": D, "V": V})
