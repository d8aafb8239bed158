"""MXFP4 by three roundings a number: the grid of E2M1 has steps of 1/2 up to 2, 1 up to 4 and 2 up to 6."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8_quantize.scales import FP4_MAX, FP4_REACH, GROUP, check_finite, check_scale, decode
from kernels.fp8_quantize.scales import host_only as unsupported  # noqa: F401
from kernels.fp8_quantize.torch import power_of_two


def codes_of(y: Tensor) -> Tensor:
    """Codes 0..15 as uint8 of numbers over their scale, rounded to nearest even, saturated.

    Each line counts steps on one third of the grid; outside it the step is too fine or too coarse, and the count too
    high, so the least of the three is the code. ``round`` takes ties to even, which is the even code everywhere.
    """
    size = y.abs().clamp_(max=FP4_MAX)
    code = (size * 2).round_()
    torch.minimum(code, size.round().add_(2), out=code)
    torch.minimum(code, size.mul_(0.5).round_().add_(4), out=code)
    return code.to(torch.uint8).add_(torch.signbit(y).to(torch.uint8), alpha=8)


def mxfp4_quantize(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``reference.mxfp4_quantize``."""
    columns = x.shape[-1]
    if columns % 2:
        raise ValueError(f"MXFP4 packs two columns a byte; {columns} columns are odd")
    full = x.to(torch.float32)
    if columns % GROUP:
        full = F.pad(full, (0, -columns % GROUP))
    grid = full.unflatten(-1, (-1, GROUP))
    if scale is None:
        scale = power_of_two(grid.abs().amax(-1), FP4_REACH)
    else:
        check_scale(scale, grid.shape[:-1])
        check_finite(grid)
    pairs = codes_of(grid / decode(scale)[..., None]).unflatten(-1, (-1, 2))
    packed = (pairs[..., 0] | (pairs[..., 1] << 4)).flatten(-2)
    return packed[..., : columns // 2].contiguous().view(torch.int8), scale
