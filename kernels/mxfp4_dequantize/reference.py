"""Numbers of an MXFP4 matrix: E2M1 value times the scale of its 32 neighbours in the row."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.fp8_quantize.scales import E2M1, FP4_MAX, GROUP, check_range, check_scale, decode
from kernels.fp8_quantize.scales import host_only as unsupported  # noqa: F401


def mxfp4_dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``[..., out, in]`` in ``dtype``; exact in bfloat16 for scales up to 2^125, the sign of zero kept.

    Args:
        codes: ``[..., out, in/2]`` int8 or uint8, the even column in the low half of a byte.
        scale: ``[..., out, ceil(in/32)]`` E8M0.

    Raises:
        ValueError: a NaN scale (255), scales of another shape, a product out of the dtype's range.
    """
    *batch, half = codes.shape
    check_scale(scale, (*batch, -(-2 * half // GROUP)))
    full, byte = decode(scale), codes.view(torch.uint8).long()
    code = torch.stack([byte & 15, byte >> 4], -1).flatten(-2)
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)[code]
    values = values * full.double()[..., torch.arange(2 * half) // GROUP]
    return check_range(values.to(dtype), full, FP4_MAX)
