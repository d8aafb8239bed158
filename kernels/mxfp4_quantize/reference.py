"""MXFP4: E2M1 codes, two a byte, and an E8M0 scale for each 32 of a row (DeepSeek-V4's routed experts)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.fp8_quantize.scales import (
    E2M1,
    FP4_MAX,
    FP4_REACH,
    GROUP,
    check_finite,
    check_scale,
    decode,
    encode,
)
from kernels.fp8_quantize.scales import host_only as unsupported  # noqa: F401


def mxfp4_quantize(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of a matrix, rounded to nearest even and saturated at ±6 scales.

    Args:
        x: ``[..., out, in]``, ``in`` even; the last group of a row may be shorter than 32.
        scale: ``[..., out, ceil(in/32)]`` E8M0: use these. None: the smallest power of two that reaches the group's
            largest magnitude; 1 for a group of zeros.

    Returns:
        codes ``[..., out, in/2]`` int8, the even column in the low half of a byte, and the scales in E8M0.

    Raises:
        ValueError: an odd width, infinite or NaN input, a scale that is no positive number, scales of another shape.
    """
    *batch, columns = x.shape
    if columns % 2:
        raise ValueError(f"MXFP4 packs two columns a byte; {columns} columns are odd")
    grid, check = (*batch, -(-columns // GROUP)), x.double()
    check_finite(check)
    if scale is None:
        groups = [check[..., i : i + GROUP].abs().amax(-1) for i in range(0, columns, GROUP)]
        amax = torch.stack(groups, -1)
        scale = encode(torch.where(amax > 0, (amax / FP4_REACH).log2().ceil(), 0))
    check_scale(scale, grid)
    y = check / decode(scale).double()[..., torch.arange(columns) // GROUP]
    distance = (y.abs().clamp(max=FP4_MAX)[..., None] - torch.tensor(E2M1, dtype=torch.float64)).abs()
    # An odd code loses a tie.
    code = (distance + 1e-9 * (torch.arange(8) % 2)).argmin(-1)
    code = (code + 8 * torch.signbit(y)).to(torch.uint8)
    return (code[..., 0::2] + 16 * code[..., 1::2]).view(torch.int8), scale
