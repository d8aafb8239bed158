"""mHC, the way in: mixing coefficients and the collapse of the streams (TR §2.2; ``DeepseekV4HyperConnection``).

Legend: N tokens, n streams, D model; coefficient matrices ``C_Njk`` mix stream j into stream k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype


def sinkhorn(comb_Njk: Tensor, iterations: int, eps: float) -> Tensor:
    """Alternate column and row normalisation, columns first and last."""
    comb_Njk = comb_Njk / (comb_Njk.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb_Njk = comb_Njk / (comb_Njk.sum(-1, keepdim=True) + eps)
        comb_Njk = comb_Njk / (comb_Njk.sum(-2, keepdim=True) + eps)
    return comb_Njk


def hyper_connection_pre(
    h_NnD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(collapsed [N, D], post [N, n], comb [N, n, n], h)`` of streams ``h [N, n, D]``; coefficients in fp32.

    ``fn [n(n+2), nD]``, ``base [n(n+2)]``, ``scale [3]`` make pre, post and comb; the streams are handed on so that an
    implementation may add the gradients of both their uses in place.
    """
    full, (N, n, D) = full_dtype(h_NnD), h_NnD.shape
    u = h_NnD.to(full).reshape(N, n * D)
    z = (u * (u.square().mean(-1, keepdim=True) + norm_eps).rsqrt()) @ fn.to(full).T
    pre, post, comb = z.split([n, n, n * n], -1)
    base_pre, base_post, base_comb = base.to(full).split([n, n, n * n])
    s = scale.to(full)
    pre = torch.sigmoid(pre * s[0] + base_pre) + eps
    post = 2 * torch.sigmoid(post * s[1] + base_post)
    comb = (comb * s[2] + base_comb).view(N, n, n).softmax(-1) + eps
    collapsed = (pre[..., None] * h_NnD.to(full)).sum(1).to(h_NnD.dtype)
    return collapsed, post, sinkhorn(comb, iterations, eps), h_NnD
