"""The same by a table of all 256 bytes: each gives its two numbers at once."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.fp8_quantize.scales import E2M1, FP4_MAX, GROUP, check_range, check_scale, decode
from kernels.fp8_quantize.scales import host_only as unsupported  # noqa: F401

_VALUES = torch.tensor([*E2M1, *(-v for v in E2M1)])
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], -1)  # [256, 2]: low half, high half
# A pair of numbers as one integer, so that the look-up moves it whole.
_TABLES = {
    torch.bfloat16: _PAIRS.to(torch.bfloat16).view(torch.int32).flatten(),
    torch.float32: _PAIRS.view(torch.int64).flatten(),
}


def mxfp4_dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """See ``reference.mxfp4_dequantize``."""
    *batch, half = codes.shape
    check_scale(scale, (*batch, -(-2 * half // GROUP)))
    full = decode(scale)
    index = codes.view(torch.uint8).flatten().to(torch.int32)
    values = _TABLES[dtype].to(codes.device).index_select(0, index).view(dtype).view(*batch, 2 * half)
    whole = 2 * half // GROUP * GROUP
    factor = full.to(dtype)[..., None]
    if whole:
        values[..., :whole].unflatten(-1, (-1, GROUP)).mul_(factor[..., : whole // GROUP, :])
    if whole < 2 * half:
        values[..., whole:].mul_(factor[..., -1, :])
    return check_range(values, full, FP4_MAX)
