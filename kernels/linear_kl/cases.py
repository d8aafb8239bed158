"""Random students and teachers. Legend: N tokens, D and E widths of student and teacher, V vocabulary."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, normal

VARIANTS = (
    {"kind": "reverse"},
    {"kind": "forward"},
    {"kind": "js"},
    {"kind": "js", "beta": 0.1, "chunk": 3},
    {"kind": "reverse", "chunk": 3},
    {"kind": "forward", "chunk": 1},
)


def case(
    g: torch.Generator, size: str, *, kind: str = "reverse", beta: float = 0.5, chunk: int | None = None
) -> Case:
    if size == SMALL:
        N, D, E, V = between(g, 1, 20), between(g, 1, 12), between(g, 1, 12), between(g, 2, 40)
    else:
        N, D, E, V = 128, 256, 384, 8192
    inputs = {
        "student_hidden_ND": normal(g, N, D),
        "student_head_VD": normal(g, V, D) / D**0.5,
        "teacher_hidden_NE": normal(g, N, E),
        "teacher_head_VE": normal(g, V, E) / E**0.5,
    }
    names = ("student_hidden_ND", "student_head_VD")
    flops = 2 * N * V * (3 * D + E)
    shape = {"N": N, "D": D, "E": E, "V": V}
    return Case(inputs, {"kind": kind, "beta": beta, "chunk": chunk}, names, flops=flops, shape=shape)
