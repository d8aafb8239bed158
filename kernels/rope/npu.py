"""RoPE by ``npu_rotary_mul`` in interleaved mode, on the turned channels alone and in fp32 as the definition asks.

The operator wants TND: tokens, heads, channels, with one angle a channel and token ``[T, 1, D]``; ours are one a pair.
torch_npu's own gradient would keep the input; ours is the opposite turn and keeps the angles only. Limits (op-plugin's
document): fewer than 1000 heads, fewer than 896 turned channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu
from kernels._support import apply, full_dtype
from kernels.rope.torch import rope as by_torch

OPERATORS = ("npu::npu_rotary_mul",)
unsupported = _npu.runs(OPERATORS)


def turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """x with its last ``2·R`` channels turned (``reference.rope``); no gradient."""
    width = 2 * cos.shape[-1]
    full, heads = full_dtype(x), _heads(x, cos)
    turned = x[..., x.shape[-1] - width :].to(full).reshape(-1, heads, width)
    out = _npu.call(
        OPERATORS[0],
        turned,
        _channels(cos, x, heads, full),
        _channels(-sin if inverse else sin, x, heads, full),
        "interleave",
    )
    out = out.reshape(*x.shape[:-1], width).to(x.dtype)
    return out if width == x.shape[-1] else torch.cat([x[..., : x.shape[-1] - width], out], -1)


def _heads(x: Tensor, angle: Tensor) -> int:
    """How many neighbouring rows of x share an angle: the last dimension of rows where the angles have one."""
    shared = angle.dim() == x.dim() and x.dim() > 2 and angle.shape[-2] == 1
    return x.shape[-2] if shared else 1


def _channels(angle: Tensor, x: Tensor, heads: int, full: torch.dtype) -> Tensor:
    """``[T, 1, 2R]``: each pair's angle for both of its channels."""
    rows = x.shape[:-1] if heads == 1 else (*x.shape[:-2], 1)
    return (
        angle.to(full).expand(*rows, angle.shape[-1]).reshape(-1, 1, angle.shape[-1]).repeat_interleave(2, -1)
    )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        return turn(grad, *ctx.saved_tensors, inverse=True), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``reference.rope``; cos and sin get no gradient."""
    heads, width = _heads(x, cos), 2 * cos.shape[-1]
    if _npu.outside(
        "rope",
        (heads >= 1000, f"npu_rotary_mul takes fewer than 1000 heads, not {heads}"),
        (width >= 896, f"npu_rotary_mul turns fewer than 896 channels, not {width}"),
        (not x.numel(), "npu_rotary_mul takes no empty tensor"),
    ):
        return by_torch(x, cos, sin)
    return apply(_Rope, x, cos, sin)
