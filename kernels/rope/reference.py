"""Interleaved partial RoPE (TR §2.3.3): adjacent pairs of the last channels are rotated, the others pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last ``2·R`` channels of ``x [..., K]`` by angles whose ``cos, sin`` are ``[..., R]``, broadcastable.

    fp32 inside, dtype of x out.
    """
    passed, turned = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], -1)
    even, odd = turned.to(full_dtype(x)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([passed, turned.to(x.dtype)], -1)
