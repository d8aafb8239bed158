"""Random inputs of linear maps. Legend: I inputs, O outputs, G groups, N rows."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal

VARIANTS = ({"grouped": False}, {"grouped": True})


def case(g: torch.Generator, size: str, *, grouped: bool = False) -> Case:
    if size == SMALL:
        lead, G, I, O = (
            (between(g, 1, 3), between(g, 1, 9)),
            between(g, 1, 4),
            between(g, 1, 24),
            between(g, 1, 24),
        )
    else:
        lead, G, I, O = (1, 1024), 4, 512, 512
    N, G = lead[0] * lead[1], G if grouped else 1
    inputs = {"x": normal(g, *lead, G * I), "weight": normal(g, *((G, O, I) if grouped else (O, I)))}
    shape = {"N": N, "G": G, "I": I, "O": O}
    return Case(inputs, {}, tuple(inputs), flops=3 * 2 * N * G * I * O, shape=shape)
