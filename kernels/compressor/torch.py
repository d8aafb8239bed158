"""Window pooling that saves its inputs only; tokens reach their window by a gather whose gradient is a gather.

Legend as in ``reference``; Y slots that an entry pools (m, or 2m with overlap).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import apply, full_dtype
from kernels.geometry import Entries, Geometry


def _windows(x_BTF: Tensor, entries: Entries) -> Tensor:
    """Tokens by window ``[B, C, m, F]``: a view where each row is one document."""
    B, _, F = x_BTF.shape
    shape = (B, entries.count, entries.rate, F)
    if entries.single:
        return x_BTF[:, : entries.count * entries.rate].reshape(shape)
    return x_BTF.reshape(-1, F).index_select(0, entries.tokens).view(shape)


def _tokens(d_BCmF: Tensor, entries: Entries, like_BTF: Tensor) -> Tensor:
    """Transpose of ``_windows``: each token is in one window or none."""
    B, T, F = like_BTF.shape
    if entries.single:
        out = d_BCmF.new_zeros(B, T, F)
        out[:, : entries.count * entries.rate] = d_BCmF.view(B, -1, F)
        return out.to(like_BTF.dtype)
    d_BTF = d_BCmF.reshape(-1, F).index_select(0, entries.inverse.clamp(min=0))
    return d_BTF.mul_((entries.inverse >= 0)[:, None]).view(B, T, F).to(like_BTF.dtype)


def _slots(x_BCmF: Tensor, head_BC: Tensor | None, fill: float) -> Tensor:
    """The Y slots of each entry ``[B, C, Y, K]``: [first half of the window before | second half of its own]."""
    if head_BC is None:
        return x_BCmF
    B, C, m, F = x_BCmF.shape
    out = x_BCmF.new_empty(B, C, 2 * m, F // 2)
    out[:, :1, :m] = (
        fill  # the first entry of a row follows none; where a row has no entry at all, no head says so
    )
    out[:, 1:, :m] = x_BCmF[:, :-1, :, : F // 2]
    out[:, :, m:] = x_BCmF[..., F // 2 :]
    out[:, :, :m].masked_fill_(head_BC[..., None, None], fill)
    return out


def _unslots(d_BCYK: Tensor, head_BC: Tensor | None) -> Tensor:
    """Transpose of ``_slots``."""
    if head_BC is None:
        return d_BCYK
    B, C, Y, K = d_BCYK.shape
    m = Y // 2
    out = d_BCYK.new_empty(B, C, m, 2 * K)
    out[:, :-1, :, :K] = d_BCYK[:, 1:, :m]
    out[:, -1:, :, :K] = 0
    out[:, :-1, :, :K].masked_fill_(head_BC[:, 1:, None, None], 0)
    out[..., K:] = d_BCYK[:, :, m:]
    return out


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv_BTF, gate_BTF, bias_mF, entries, overlap):
        full = full_dtype(kv_BTF)
        head_BC = entries.positions_BC == 0 if overlap else None
        kv = _slots(_windows(kv_BTF, entries).to(full), head_BC, 0.0)
        p = _slots(_windows(gate_BTF, entries) + bias_mF.to(full), head_BC, float("-inf")).softmax(2)
        out_BCK = (kv * p).sum(2)
        ctx.save_for_backward(kv_BTF, gate_BTF, bias_mF, out_BCK)
        ctx.entries, ctx.overlap = entries, overlap
        return out_BCK.to(kv_BTF.dtype)

    @staticmethod
    def backward(ctx, grad_BCK):
        kv_BTF, gate_BTF, bias_mF, out_BCK = ctx.saved_tensors
        entries, full = ctx.entries, full_dtype(kv_BTF)
        head_BC = entries.positions_BC == 0 if ctx.overlap else None
        kv = _slots(_windows(kv_BTF, entries).to(full), head_BC, 0.0)
        p = _slots(_windows(gate_BTF, entries) + bias_mF.to(full), head_BC, float("-inf")).softmax(2)
        d_kv = p.mul_(grad_BCK.to(full)[:, :, None])
        # softmax: d gate = p·g·(kv - out)
        d_gate = _unslots(kv.sub_(out_BCK[:, :, None]).mul_(d_kv), head_BC)
        d_kv = _unslots(d_kv, head_BC)
        d_bias = d_gate.sum((0, 1)).to(bias_mF.dtype)
        return _tokens(d_kv, entries, kv_BTF), _tokens(d_gate, entries, gate_BTF), d_bias, None, None


def compressor(
    kv_BTF: Tensor, gate_BTF: Tensor, bias_mF: Tensor, geometry: Geometry, *, rate: int, overlap: bool
) -> Tensor:
    """See ``reference.compressor``."""
    entries = geometry.windows(rate)
    if entries.count == 0:
        return kv_BTF[:, :0, : kv_BTF.shape[-1] // (2 if overlap else 1)]
    return apply(_Compress, kv_BTF, gate_BTF, bias_mF, entries, overlap)
