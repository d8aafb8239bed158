"""Pooling of token windows to compressed entries (TR §2.3.1-2, eq. 9-12 and 20-23).

Legend: B rows, T tokens, C entries, K entry dimension, m compression rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype
from kernels.geometry import Geometry


def compressor(
    kv_BTF: Tensor, gate_BTF: Tensor, bias_mF: Tensor, geometry: Geometry, *, rate: int, overlap: bool
) -> Tensor:
    """Pooled entries ``[B, C, K]`` with C = T div rate (of a part of a row: its ``Windows``), before norm and RoPE.

    Per channel, a softmax of ``gate + bias[position in window]`` weighs the tokens of a window. With ``overlap`` (CSA)
    F = 2K: entry i pools the first half of window i-1 and the second half of window i; else (HCA) F = K. Slots beyond
    the entries of a row hold finite values that no query may see.
    """
    full, B, _T, F = full_dtype(kv_BTF), *kv_BTF.shape
    entries = geometry.windows(rate)
    shape = (B, entries.count, rate, F)
    kv = kv_BTF.to(full).reshape(-1, F)[entries.tokens].view(shape)
    gate = gate_BTF.to(full).reshape(-1, F)[entries.tokens].view(shape) + bias_mF.to(full)
    if overlap and entries.count:
        K = F // 2
        before = lambda x, fill: torch.cat([torch.full_like(x[:, :1, :, :K], fill), x[:, :-1, :, :K]], 1)  # noqa: E731
        head_BC11 = (entries.positions_BC == 0)[..., None, None]
        gate_before = before(gate, 0.0).masked_fill(head_BC11, float("-inf"))
        kv = torch.cat([before(kv, 0.0), kv[..., K:]], 2)
        gate = torch.cat([gate_before, gate[..., K:]], 2)
    elif overlap:
        kv, gate = kv[..., : F // 2], gate[..., : F // 2]
    return (kv * gate.softmax(2)).sum(2).to(kv_BTF.dtype)
