"""Random inputs of rms_norm. Legend: B rows, T tokens, D width."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal


def case(g: torch.Generator, size: str) -> Case:
    B, T, D = (between(g, 1, 3), between(g, 1, 9), between(g, 1, 40)) if size == SMALL else (1, 2048, 1024)
    inputs = {"x": normal(g, B, T, D), "weight": normal(g, D)}
    return Case(inputs, {"eps": 1e-6}, ("x", "weight"), shape={"B": B, "T": T, "D": D})
