"""Routing that keeps its input in the model's dtype for the backward pass, not the fp32 copy the logits are made of.

Legend as in ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._products import mm
from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import apply, full_dtype
from kernels.routing.reference import SCORES, choose


class _Logits(torch.autograd.Function):
    """``x · weightᵀ`` in at least fp32."""

    @staticmethod
    def forward(ctx, x_ND, weight_ED):
        ctx.save_for_backward(x_ND, weight_ED)
        full = full_dtype(x_ND)
        return mm(x_ND.to(full), weight_ED.to(full).T)

    @staticmethod
    def backward(ctx, grad_NE):
        x_ND, weight_ED = ctx.saved_tensors
        d_x = mm(grad_NE, weight_ED.to(grad_NE.dtype)).to(x_ND.dtype)
        return d_x, mm(grad_NE.T, x_ND.to(grad_NE.dtype)).to(weight_ED.dtype)


def routing(
    x_ND: Tensor,
    weight_ED: Tensor,
    *,
    k: int,
    scoring: str,
    scaling: float,
    bias_E: Tensor | None = None,
    experts_Nk: Tensor | None = None,
    want_scores: bool = False,
) -> tuple[Tensor, ...]:
    """See ``reference.routing``."""
    scores_NE = SCORES[scoring](apply(_Logits, x_ND, weight_ED))
    found = choose(scores_NE, k, scaling, bias_E, experts_Nk)
    return (*found, scores_NE) if want_scores else found
