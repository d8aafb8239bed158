"""mHC, the way in, by ``mhc_pre_sinkhorn`` of CANN's extension ``cann_ops_transformer`` (A2, A3), where it is
installed.

torch_npu's own mHC operators are for the 950 only. The extension has no formula for autograd: forward and backward are
called by name here, and its layout ``[B, S, n, D]`` is ours with one row. Limits (document of the extension, CANN 9.1):
four streams, 20 iterations, D a multiple of 128 up to 100,000, streams in bf16 or fp16, all else in fp32. Legend as in
``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu
from kernels._support import apply, full_dtype
from kernels.hyper_connection_pre.torch import hyper_connection_pre as by_torch

OPERATORS = (
    "cann_ops_transformer::mhc_pre_sinkhorn",
    "cann_ops_transformer::mhc_pre_sinkhorn_backward",
)
FORWARD, BACKWARD = OPERATORS
unsupported = _npu.runs(OPERATORS, _npu.HALVES)


class _Pre(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NnD, fn, base, scale, iterations, eps, norm_eps):
        full, (N, n, _D) = full_dtype(h_NnD), h_NnD.shape
        coefficients = fn.to(full), scale.to(full), base.to(full)
        collapsed, post, comb, *kept = _npu.call(
            FORWARD, h_NnD[None], *coefficients, n, iterations, eps, norm_eps, True
        )
        ctx.save_for_backward(h_NnD, fn, base, scale, *kept)
        ctx.eps = eps
        return collapsed.view(N, -1), post.view(N, n), comb.view(N, n, n), h_NnD

    @staticmethod
    def backward(ctx, d_collapsed, d_post, d_comb, d_h):
        h_NnD, fn, base, scale, *kept = ctx.saved_tensors
        full, (N, n, _D) = full_dtype(h_NnD), h_NnD.shape
        grads = d_collapsed[None], d_post[None], d_comb.reshape(1, N, n * n)
        coefficients = fn.to(full), scale.to(full), base.to(full)
        d_x, d_fn, d_scale, d_base = _npu.call(
            BACKWARD, *(grad.contiguous() for grad in grads), h_NnD[None], *coefficients, *kept, ctx.eps
        )
        d_streams = (d_x.view_as(h_NnD).to(full) + d_h.to(full)).to(h_NnD.dtype)
        return d_streams, d_fn.to(fn.dtype), d_base.to(base.dtype), d_scale.to(scale.dtype), None, None, None


def hyper_connection_pre(
    h_NnD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.hyper_connection_pre``."""
    N, n, D = h_NnD.shape
    if _npu.outside(
        "hyper_connection_pre",
        (n != 4, f"mhc_pre_sinkhorn takes 4 streams, not {n}"),
        (iterations != 20, f"mhc_pre_sinkhorn makes 20 iterations, not {iterations}"),
        (
            D % 128 != 0 or D > 100_000,
            f"mhc_pre_sinkhorn takes widths in steps of 128 up to 100,000, not {D}",
        ),
        (not N, "mhc_pre_sinkhorn takes no empty tensor"),
    ):
        return by_torch(h_NnD, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)
    return apply(_Pre, h_NnD.contiguous(), fn, base, scale, iterations, eps, norm_eps)
