"""Random FP8 codes and scales; the numbers must be the reference's, bit by bit."""

from __future__ import annotations

import torch

from kernels._cases import SAME_DTYPE, SMALL, Case, between
from kernels.fp8_quantize.scales import BLOCK, encode

VARIANTS = ({"first": False}, {"first": True})  # from the first row of a block, or from within one


def case(g: torch.Generator, size: str, *, first: bool = False) -> Case:
    rows, columns = (between(g, 1, 300), between(g, 1, 300)) if size == SMALL else (2048, 2048)
    first_row = between(g, 1, BLOCK - 1) if first else 0
    grid = (-(-(first_row + rows) // BLOCK), -(-columns // BLOCK))
    codes = torch.randint(0, 127, (rows, columns), generator=g) + 128 * torch.randint(
        0, 2, (rows, columns), generator=g
    )
    inputs = {
        "codes": codes.to(torch.uint8).view(torch.float8_e4m3fn),  # every code but the two NaN
        "scale": encode(torch.randint(-100, 100, grid, generator=g)),
    }
    options = {"dtype": SAME_DTYPE, "first_row": first_row}
    return Case(inputs, options, exact=True, shape={"out": rows, "in": columns})
