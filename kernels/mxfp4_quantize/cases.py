"""Random matrices to quantise; codes and scales must be the reference's, bit by bit."""

from __future__ import annotations

import torch

from kernels._cases import SMALL, Case, between, many_magnitudes
from kernels.fp8_quantize.cases import scales_near
from kernels.fp8_quantize.scales import GROUP

VARIANTS = ({"given": False}, {"given": True})  # scales found, or the caller's


def case(g: torch.Generator, size: str, *, given: bool = False) -> Case:
    rows, columns = (between(g, 1, 40), 2 * between(g, 1, 80)) if size == SMALL else (1024, 1024)
    x = many_magnitudes(g, rows, columns)
    options = {"scale": scales_near(g, x, (rows, -(-columns // GROUP)))} if given else {}
    return Case({"x": x}, options, exact=True, shape={"out": rows, "in": columns})
