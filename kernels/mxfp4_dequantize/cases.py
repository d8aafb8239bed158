"""Random MXFP4 codes and scales; the numbers must be the reference's, bit by bit."""

from __future__ import annotations

import torch

from kernels._cases import SAME_DTYPE, SMALL, Case, between
from kernels.fp8_quantize.scales import GROUP, encode


def case(g: torch.Generator, size: str) -> Case:
    rows, half = (between(g, 1, 40), between(g, 1, 80)) if size == SMALL else (2048, 1024)
    inputs = {
        "codes": torch.randint(0, 256, (rows, half), generator=g).to(torch.uint8).view(torch.int8),
        "scale": encode(torch.randint(-100, 100, (rows, -(-2 * half // GROUP)), generator=g)),
    }
    return Case(inputs, {"dtype": SAME_DTYPE}, exact=True, shape={"out": rows, "in": 2 * half})
