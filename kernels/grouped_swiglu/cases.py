"""Random inputs of the routed experts. Legend: N tokens, D model, E experts, F expert width, k experts of a token."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal

VARIANTS = ({"spread": 0.5}, {"spread": 8.0})  # values within the limit of the clamp, and far beyond it


def case(g: torch.Generator, size: str, *, spread: float = 0.5) -> Case:
    if size == SMALL:
        # Multiples of 8: rows of 16 bytes in every dtype.
        N, D, F, E = between(g, 1, 24), 8 * between(g, 1, 3), 8 * between(g, 1, 2), between(g, 3, 8)
        k = between(g, 1, E - 1)
        shrink = 1.0
    else:
        N, D, F, E, k = 512, 256, 128, 16, 4
        shrink = D**-0.5
    inputs = {
        "x_ND": normal(g, N, D) * spread,
        "experts_Nk": torch.rand(N, E - 1, generator=g).argsort(1)[:, :k],  # the last expert gets no token
        "weights_Nk": normal(g, N, k).abs(),
        "gate_up_EGD": normal(g, E, 2 * F, D) * shrink,
        "down_EDF": normal(g, E, D, F) * shrink,
    }
    names = ("x_ND", "weights_Nk", "gate_up_EGD", "down_EDF")
    shape = {"N": N, "D": D, "F": F, "E": E, "k": k}
    flops = 3 * 2 * N * k * 3 * D * F
    return Case(inputs, {"limit": 10.0}, names, ("weights_Nk",), flops=flops, shape=shape)
