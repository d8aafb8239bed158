"""Numbers of an FP8 matrix in 128x128 blocks: code times the scale of its block, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.fp8_quantize.scales import BLOCK, FP8_MAX, check_range, check_scale, decode
from kernels.fp8_quantize.scales import host_only as unsupported  # noqa: F401


def fp8_dequantize(
    codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, first_row: int = 0
) -> Tensor:
    """``[..., out, in]`` in ``dtype``; exact in bfloat16 where the scale is a power of two in 2^-124 … 2^119.

    Args:
        codes: ``[..., out, in]`` float8_e4m3fn.
        scale: ``[..., ceil((first_row + out)/128), ceil(in/128)]``, E8M0 or fp32.
        first_row: place of the first row in its block, below 128: a slice of a larger matrix.

    Raises:
        ValueError: a NaN code or scale, scales of another shape, a product out of the dtype's range.
    """
    *batch, rows, columns = codes.shape
    check_scale(scale, (*batch, -(-(first_row + rows) // BLOCK), -(-columns // BLOCK)))
    full = decode(scale)
    if bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise ValueError("an E4M3 code is NaN")
    row_block = (torch.arange(rows) + first_row) // BLOCK
    column_block = torch.arange(columns) // BLOCK
    values = codes.to(torch.float64) * full.double()[..., row_block[:, None], column_block[None, :]]
    return check_range(values.to(dtype), full, FP8_MAX)
