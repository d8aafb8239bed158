"""RoPE in one pass over the rotated channels; the gradient is the opposite rotation, nothing but angles is saved."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import apply


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last channels of ``x`` in place (``reference.rope``) and return x."""
    turned = x[..., x.shape[-1] - 2 * cos.shape[-1] :].unflatten(-1, (-1, 2))
    if x.dtype in (torch.float32, torch.float64) and x.device.type in ("cpu", "cuda"):
        angle = torch.complex(cos.to(x.dtype), (-sin if inverse else sin).to(x.dtype))
        torch.view_as_complex(turned).mul_(angle)
        return x
    even, odd = turned.float().unbind(-1)
    sin = -sin if inverse else sin
    turned.copy_(torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1))
    return x


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate_(x.clone(memory_format=torch.contiguous_format), cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate_(grad.clone(memory_format=torch.contiguous_format), cos, sin, inverse=True), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``reference.rope``; cos and sin get no gradient."""
    return apply(_Rope, x, cos, sin)
