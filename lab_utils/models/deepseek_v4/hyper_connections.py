"""Manifold-constrained hyper-connections (TR §2.2): the residual is n streams, mixed by doubly-stochastic matrices.

Legend: B rows, T tokens, N = B·T, n streams, D model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from kernels._support import apply
from lab_utils.models.deepseek_v4.layers import operator

CHUNK_ELEMENTS = 1 << 22  # elements of the streams that are held in fp32 at once


class HyperConnection(nn.Module):
    """Coefficients of one block, its way in (``collapse``) and its way out (``expand``)."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        n = config.hc_mult
        self.fn = nn.Parameter(torch.empty(n * (n + 2), n * config.hidden_size))
        self.base = nn.Parameter(torch.empty(n * (n + 2)))
        self.scale = nn.Parameter(torch.empty(3))
        self.options = {
            "iterations": config.hc_sinkhorn_iters,
            "eps": config.hc_eps,
            "norm_eps": config.rms_norm_eps,
        }

    def collapse(self, h_BTnD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The block's input ``[B, T, D]``, and what ``expand`` needs."""
        pre = operator("hyper_connection_pre", h_BTnD)
        x_ND, post, comb, h_NnD = pre(h_BTnD.flatten(0, 1), self.fn, self.base, self.scale, **self.options)
        return x_ND.view(*h_BTnD.shape[:2], -1), (post, comb, h_NnD)

    def expand(self, y_BTD: Tensor, kept: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The streams after the block ``[B, T, n, D]``."""
        post, comb, h_NnD = kept
        mixed = operator("hyper_connection_post", y_BTD)(h_NnD, y_BTD.flatten(0, 1), post, comb)
        return mixed.view(*y_BTD.shape[:2], *mixed.shape[1:])


class HyperHead(nn.Module):
    """The streams' last collapse, before the final norm: ``Σ_j a_j h_j`` with ``a = σ(s·z + base) + ε``."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        n = config.hc_mult
        self.hc_fn = nn.Parameter(torch.empty(n, n * config.hidden_size))
        self.hc_base = nn.Parameter(torch.empty(n))
        self.hc_scale = nn.Parameter(torch.empty(1))
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps

    def forward(self, h_BTnD: Tensor) -> Tensor:
        """``[B, T, D]`` in the streams' dtype; computed in fp32 whatever that is."""
        parameters = (self.hc_fn, self.hc_base, self.hc_scale)
        x_ND = apply(_Collapse, h_BTnD.flatten(0, 1), *parameters, self.eps, self.norm_eps)
        return x_ND.view(*h_BTnD.shape[:2], -1)


class _Collapse(torch.autograd.Function):
    """Saves the streams as they came, and n + 1 numbers of each token; fp32 copies exist for a chunk of tokens.

    ``z = (fn·u)·r`` with u the streams as one vector and ``r = rsqrt(mean u² + ε)`` (TR §2.2; ``hc_head`` of the
    reference code).
    """

    @staticmethod
    def forward(ctx, h_NnD, fn, base, scale, eps, norm_eps):
        full, (N, n, D) = torch.promote_types(h_NnD.dtype, torch.float32), h_NnD.shape
        x_ND = h_NnD.new_empty(N, D)
        z_Nn, inverse_N1 = (torch.empty(N, m, dtype=full, device=h_NnD.device) for m in (n, 1))
        ctx.save_for_backward(h_NnD, fn, base, scale, z_Nn, inverse_N1)
        ctx.eps = eps
        fn, base, scale = fn.to(full), base.to(full), scale.to(full)
        for part in _chunks(h_NnD):
            h = h_NnD[part].to(full)
            u = h.flatten(1)
            norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
            inverse_N1[part] = (norm.square() / (n * D) + norm_eps).rsqrt()
            z_Nn[part] = (u @ fn.T).mul_(inverse_N1[part])
            a = torch.sigmoid(z_Nn[part] * scale + base) + eps
            x_ND[part] = torch.bmm(a[:, None], h).squeeze(1)
        return x_ND

    @staticmethod
    def backward(ctx, grad_ND):
        h_NnD, *parameters, z_Nn, inverse_N1 = ctx.saved_tensors
        full, n, D = z_Nn.dtype, *h_NnD.shape[1:]
        fn, base, scale = (p.to(full) for p in parameters)
        d_h, d_fn = torch.empty_like(h_NnD), torch.zeros_like(fn)
        d_base, d_scale = torch.zeros_like(base), torch.zeros_like(scale)
        for part in _chunks(h_NnD):
            h, grad, z, inverse = h_NnD[part].to(full), grad_ND[part].to(full), z_Nn[part], inverse_N1[part]
            u, gate = h.flatten(1), torch.sigmoid(z * scale + base)
            d_logit = torch.bmm(h, grad[..., None]).squeeze(2) * gate * (1 - gate)
            d_base += d_logit.sum(0)
            d_scale += (d_logit * z).sum()
            d_z = d_logit * scale
            d_raw = d_z * inverse
            d_fn.addmm_(d_raw.T, u)
            # du = r·dz·fn - u·r²·Σ(dz·z)/(nD), and the way through the weighted sum
            inner = (d_z * z).sum(1, keepdim=True) * inverse.square() / (-n * D)
            d_u = ((gate + ctx.eps)[..., None] * grad[:, None]).flatten(1)
            d_h[part] = d_u.addmm_(d_raw, fn).addcmul_(u, inner).view(h.shape)
        found = (d.to(p.dtype) for d, p in zip((d_fn, d_base, d_scale), parameters, strict=True))
        return d_h, *found, None, None


def _chunks(h_NnD: Tensor) -> Iterator[slice]:
    tokens = max(1, CHUNK_ELEMENTS // h_NnD[0].numel()) if len(h_NnD) else 1
    return (slice(start, start + tokens) for start in range(0, len(h_NnD), tokens))
