"""RMSNorm (transformers ``DeepseekV4RMSNorm``): fp32 inside, weight applied in fp32, one cast at the end."""

from __future__ import annotations

from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension; any leading shape, dtype of x."""
    x_full = x.to(full_dtype(x))
    scale = (x_full.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x_full * scale * weight.to(x_full.dtype)).to(x.dtype)
