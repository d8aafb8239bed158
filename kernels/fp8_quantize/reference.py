"""FP8 in blocks: E4M3 codes and a scale for each 128x128 block, as DeepSeek-V4 stores its dense weights."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.fp8_quantize.scales import BLOCK, FP8_REACH, check_finite, check_scale, decode, encode
from kernels.fp8_quantize.scales import host_only as unsupported  # noqa: F401


def fp8_quantize(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, rounded to nearest even and saturated at ±448 scales.

    Args:
        x: ``[..., out, in]``; the last block of a row or column may be smaller.
        scale: ``[..., ceil(out/128), ceil(in/128)]``, E8M0 or fp32: use these. None: the smallest power of two that
            reaches the block's largest magnitude; 1 for a block of zeros.

    Returns:
        codes ``[..., out, in]`` float8_e4m3fn, and the scales (E8M0 where none were given).

    Raises:
        ValueError: infinite or NaN input, a scale that is no positive number, scales of another shape.
    """
    *batch, rows, columns = x.shape
    grid = (*batch, -(-rows // BLOCK), -(-columns // BLOCK))
    if scale is None:
        scale = torch.empty(grid, dtype=torch.float8_e8m0fnu)
        for i, j, block in _blocks(x):
            amax = block.abs().amax((-2, -1)).double()
            check_finite(amax)
            exponent = torch.where(amax > 0, (amax / FP8_REACH).log2().ceil(), 0)
            scale[..., i, j] = encode(exponent)
    check_scale(scale, grid)
    full = decode(scale).double()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    for i, j, block in _blocks(x):
        check_finite(block)
        codes[..., i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] = _nearest(
            block.double() / full[..., i, j, None, None]
        )
    return codes.view(torch.float8_e4m3fn), scale


def _blocks(x: Tensor):
    for i in range(-(-x.shape[-2] // BLOCK)):
        for j in range(-(-x.shape[-1] // BLOCK)):
            yield i, j, x[..., i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]


def _nearest(y: Tensor) -> Tensor:
    """Code of the nearest E4M3 number; of two as near, the even code."""
    magnitudes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    above = torch.searchsorted(magnitudes, y.abs()).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = magnitudes[above] - y.abs(), y.abs() - magnitudes[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = torch.where(y.abs() >= magnitudes[126], 126, code)
    return (code + torch.signbit(y) * 128).to(torch.uint8)
