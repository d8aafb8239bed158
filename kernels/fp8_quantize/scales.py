"""Scales of quantised blocks, for the four operators: E8M0 (a byte b for 2^(b-127), 255 for NaN) and its rule.

Which power of two a block gets: the smallest at which its largest magnitude still rounds to the format's largest
number. For FP8 that is amax ≤ 464·s (464 lies half-way between 448 and the missing 480), for MXFP4 amax ≤ 7·s (half-way
between 6 and the missing 8). Against the usual amax ≤ 448·s and 6·s the largest number is rounded just as well, and in
the few blocks where the rules differ all others lie on a grid twice as fine. It also makes the rule a fixed point: a
block that it quantised has 240..448 (4 or 6) as its largest code, so that quantising its values again gives the same
scale and the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # FP8: side of a block
GROUP = 32  # MXFP4: numbers of a row that share a scale
FP8_MAX, FP8_REACH = 448.0, 464.0
FP4_MAX, FP4_REACH = 6.0, 7.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0..7; bit 3 is the sign


def host_only(device_type: str, dtype: torch.dtype) -> str | None:
    """``unsupported`` of the four operators: torch has the 8-bit dtypes on CPU and CUDA, Ascend 910 does not."""
    if device_type not in ("cpu", "cuda"):
        return f"{device_type} has no 8-bit floats"
    return None if dtype in (torch.float32, torch.bfloat16) else f"{dtype} is neither float32 nor bfloat16"


def decode(scale: Tensor) -> Tensor:
    """fp32 values of E8M0 scales (``float8_e8m0fnu``, or its bytes as uint8) or of fp32 ones; exact.

    Raises:
        ValueError: a scale that is no positive number; E8M0's 255 is NaN.
    """
    full = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).to(torch.float32)
    if not bool(((full > 0) & full.isfinite()).all()):
        raise ValueError("a block's scale is not a positive number (E8M0 code 255 is NaN)")
    return full


def encode(exponent: Tensor) -> Tensor:
    """E8M0 of 2^exponent, within 2^-127 … 2^127."""
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def check_finite(amax: Tensor) -> None:
    """Raises ValueError where a block's largest magnitude is infinite or NaN."""
    if not bool(amax.isfinite().all()):
        raise ValueError("a number is infinite or NaN; it has no place in a quantised block")


def check_scale(scale: Tensor, expected: tuple[int, ...]) -> None:
    """Raises ValueError where scales don't have one entry a block."""
    if tuple(scale.shape) != expected:
        raise ValueError(f"scales have shape {list(scale.shape)}, the blocks ask for {list(expected)}")


def check_range(values: Tensor, scale: Tensor, largest: float) -> Tensor:
    """``values`` themselves. Raises ValueError where code times scale left the range of their dtype."""
    if float(scale.max() if scale.numel() else 0) * largest > torch.finfo(values.dtype).max and not bool(
        values.isfinite().all()
    ):
        raise ValueError(f"a number does not fit {str(values.dtype).removeprefix('torch.')}")
    return values
