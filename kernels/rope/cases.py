"""Random inputs of rope. Legend: B rows, T tokens, H heads, K head dimension, R rotated pairs."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal


def case(g: torch.Generator, size: str) -> Case:
    B, T, H, R = (between(g, 1, 3), between(g, 1, 9), between(g, 1, 4), between(g, 1, 5))
    K = 2 * R + 2 * between(g, 0, 3)
    if size != SMALL:
        B, T, H, K, R = 1, 4096, 8, 128, 32
    angle = normal(g, B, T, 1, R)
    options = {"cos": angle.cos(), "sin": angle.sin()}
    return Case({"x": normal(g, B, T, H, K)}, options, ("x",), shape={"B": B, "T": T, "H": H, "K": K, "R": R})
