"""Random matrices to quantise; codes and scales must be the reference's, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._cases import SMALL, Case, between, many_magnitudes
from kernels.fp8_quantize.scales import BLOCK, encode

VARIANTS = ({"given": False}, {"given": True})  # scales found, or the caller's


def case(g: torch.Generator, size: str, *, given: bool = False) -> Case:
    rows, columns = (between(g, 1, 300), between(g, 1, 300)) if size == SMALL else (2048, 1024)
    x = many_magnitudes(g, rows, columns)
    grid = (-(-rows // BLOCK), -(-columns // BLOCK))
    options = {"scale": scales_near(g, x, grid)} if given else {}
    return Case({"x": x}, options, exact=True, shape={"out": rows, "in": columns})


def scales_near(g: torch.Generator, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """E8M0 scales around the matrix's largest number: in some blocks codes saturate, in some they round to zero."""
    largest = float(x.abs().max().clamp(min=2.0**-100).log2())
    return encode(torch.randint(int(largest) - 12, int(largest) + 12, grid, generator=g))
