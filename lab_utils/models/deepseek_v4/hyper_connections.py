"""Manifold-constrained hyper-connections (TR §2.2): the residual is n streams, mixed by doubly-stochastic matrices.

Legend: B rows, T tokens, n streams, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from lab_utils.models.deepseek_v4.layers import operator


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
    """The streams' last collapse, before the final norm."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        n = config.hc_mult
        self.hc_fn = nn.Parameter(torch.empty(n, n * config.hidden_size))
        self.hc_base = nn.Parameter(torch.empty(n))
        self.hc_scale = nn.Parameter(torch.empty(1))
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps

    def forward(self, h_BTnD: Tensor) -> Tensor:
        u = h_BTnD.flatten(2).float()
        inverse_rms = (
            torch.linalg.vector_norm(u, dim=-1, keepdim=True).square() / u.shape[-1] + self.norm_eps
        ).rsqrt()
        z = (u @ self.hc_fn.float().T) * inverse_rms
        pre = torch.sigmoid(z * self.hc_scale.float() + self.hc_base.float()) + self.eps
        return torch.einsum("btn,btnd->btd", pre, h_BTnD.float()).to(h_BTnD.dtype)
