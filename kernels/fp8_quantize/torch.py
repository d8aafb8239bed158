"""FP8 in blocks by torch's own cast: the matrix as a grid of blocks, padded only where the edge cuts one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8_quantize.scales import BLOCK, FP8_MAX, FP8_REACH, check_finite, check_scale, decode, encode
from kernels.fp8_quantize.scales import host_only as unsupported  # noqa: F401


def grid_of_blocks(x: Tensor) -> Tensor:
    """``[..., out, in]`` as ``[..., R, 128, C, 128]``: a view, or zero-padded where a side is no multiple of 128."""
    rows, columns = x.shape[-2:]
    if rows % BLOCK or columns % BLOCK:
        x = F.pad(x, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return x.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))


def power_of_two(amax: Tensor, reach: float) -> Tensor:
    """E8M0 of the smallest power of two with ``amax ≤ reach · scale``; of 1 for zero. No logarithm, so exact."""
    check_finite(amax)
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa · 2^exponent, 0.5 ≤ mantissa < 1
    base, shift = torch.frexp(torch.tensor(reach, device=amax.device))
    exponent = exponent - shift + (mantissa > base)
    return encode(torch.where(amax > 0, exponent, 0))


def fp8_quantize(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``reference.fp8_quantize``."""
    grid = grid_of_blocks(x.to(torch.float32))
    if scale is None:
        scale = power_of_two(grid.abs().amax((-3, -1)), FP8_REACH)
        full = decode(scale)
    else:
        check_scale(scale, (*grid.shape[:-3], grid.shape[-2]))
        check_finite(grid)
        full = decode(scale)
    codes = (grid / full[..., :, None, :, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    codes = codes.flatten(-4, -3).flatten(-2, -1)
    return codes[..., : x.shape[-2], : x.shape[-1]].contiguous(), scale
