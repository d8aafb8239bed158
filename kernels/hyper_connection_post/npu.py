"""mHC, the way out, by ``mhc_post`` of CANN's extension ``cann_ops_transformer`` (A2, A3), where it is installed.

As in the way in: torch_npu's operator is for the 950 only, and the extension's backward is called by name. Its layout
``[T, n, D]`` is ours; streams and output of the block share a dtype, bf16 or fp16, the coefficients are fp32 (document
of the extension, CANN 9.1). Legend as in ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu
from kernels._support import apply
from kernels.hyper_connection_post.torch import hyper_connection_post as by_torch

OPERATORS = ("cann_ops_transformer::mhc_post", "cann_ops_transformer::mhc_post_backward")
FORWARD, BACKWARD = OPERATORS
unsupported = _npu.runs(OPERATORS, _npu.HALVES)


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NnD, y_ND, post_Nn, comb_Njk):
        ctx.save_for_backward(h_NnD, y_ND, post_Nn, comb_Njk)
        return _npu.call(FORWARD, h_NnD, comb_Njk, y_ND, post_Nn)

    @staticmethod
    def backward(ctx, grad_NnD):
        h_NnD, y_ND, post_Nn, comb_Njk = ctx.saved_tensors
        d_h, d_comb, d_y, d_post = _npu.call(BACKWARD, grad_NnD.contiguous(), h_NnD, comb_Njk, y_ND, post_Nn)
        return d_h, d_y, d_post, d_comb


def hyper_connection_post(h_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, comb_Njk: Tensor) -> Tensor:
    """See ``reference.hyper_connection_post``; the coefficients are fp32."""
    if _npu.outside(
        "hyper_connection_post",
        (y_ND.dtype != h_NnD.dtype, f"mhc_post takes streams and output of one dtype, not {y_ND.dtype} too"),
        (not len(h_NnD), "mhc_post takes no empty tensor"),
    ):
        return by_torch(h_NnD, y_ND, post_Nn, comb_Njk)
    return apply(_Post, h_NnD.contiguous(), y_ND.contiguous(), post_Nn.contiguous(), comb_Njk.contiguous())
