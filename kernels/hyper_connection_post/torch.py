"""Stream mixing as fused multiply-adds on whole streams; nothing but the inputs is saved."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import apply, full_dtype


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NnD, y_ND, post_Nn, comb_Njk):
        ctx.save_for_backward(h_NnD, y_ND, post_Nn, comb_Njk)
        out = torch.bmm(comb_Njk.transpose(1, 2), h_NnD.to(comb_Njk.dtype))
        return out.addcmul_(post_Nn[..., None], y_ND[:, None].to(out.dtype)).to(h_NnD.dtype)

    @staticmethod
    def backward(ctx, grad_NnD):
        h_NnD, y_ND, post_Nn, comb_Njk = ctx.saved_tensors
        full = full_dtype(h_NnD)
        grad = grad_NnD.to(full).contiguous()
        d_h = torch.bmm(comb_Njk, grad)
        d_y = torch.bmm(post_Nn[:, None], grad).squeeze(1)
        # One row of factors times a wide matrix is the shape in which a batched product is fast on CPU.
        d_post = torch.bmm(y_ND.to(full)[:, None], grad.transpose(1, 2)).squeeze(1)
        h = h_NnD.to(full)
        d_comb = torch.cat([torch.bmm(h[:, j, None], grad.transpose(1, 2)) for j in range(h.shape[1])], 1)
        return d_h.to(h_NnD.dtype), d_y.to(y_ND.dtype), d_post, d_comb


def hyper_connection_post(h_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, comb_Njk: Tensor) -> Tensor:
    """See ``reference.hyper_connection_post``; the coefficients are fp32."""
    return apply(_Mix, h_NnD, y_ND, post_Nn, comb_Njk)
