"""The same by a table of all 256 codes (torch's cast is a loop), multiplied in place."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.fp8_quantize.scales import BLOCK, FP8_MAX, check_range, check_scale, decode
from kernels.fp8_quantize.scales import host_only as unsupported  # noqa: F401

_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
# Numbers as integers of their width: a look-up moves them whole.
_TABLES = {
    torch.bfloat16: _CODES.to(torch.bfloat16).view(torch.int16),
    torch.float32: _CODES.to(torch.float32).view(torch.int32),
}


def fp8_dequantize(
    codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, first_row: int = 0
) -> Tensor:
    """See ``reference.fp8_dequantize``."""
    *batch, rows, columns = codes.shape
    check_scale(scale, (*batch, -(-(first_row + rows) // BLOCK), -(-columns // BLOCK)))
    full = decode(scale)
    if bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise ValueError("an E4M3 code is NaN")
    # A power of two times a code is exact in either dtype; another scale wants one rounding, from fp32.
    working = torch.float32 if scale.dtype == torch.float32 else dtype
    per_row = full.repeat_interleave(BLOCK, -2)[..., first_row : first_row + rows, :, None].to(working)
    index = codes.view(torch.uint8).flatten().to(torch.int32)
    values = _TABLES[working].to(codes.device).index_select(0, index).view(working).view(codes.shape)
    whole = columns // BLOCK * BLOCK
    if whole:
        values[..., :whole].unflatten(-1, (-1, BLOCK)).mul_(per_row[..., : whole // BLOCK, :])
    if whole < columns:
        values[..., whole:].mul_(per_row[..., -1, :])
    return check_range(values.to(dtype), full, FP8_MAX)
