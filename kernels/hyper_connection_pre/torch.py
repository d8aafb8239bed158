"""mHC, the way in, with its own backward: saves the streams and 24 coefficients a token, recomputes Sinkhorn.

The iterations work on ``[j, k, N]`` (tokens last), where sums over four streams are additions of whole vectors. The
streams pass through, so that the gradient of their mixing arrives here and is added to in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype
from kernels.rms_norm.torch import inverse_rms


def _sinkhorn(
    comb_jkN: Tensor, iterations: int, eps: float
) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
    """The balanced matrices and, for the backward pass, each step's ``(dimension, sums, result)``."""
    steps = []
    for dim in (0, *(1, 0) * (iterations - 1)):
        sums = comb_jkN.sum(dim, keepdim=True).add_(eps)
        comb_jkN = comb_jkN / sums
        steps.append((dim, sums, comb_jkN))
    return comb_jkN, steps


def _coefficients(z_zN: Tensor, base: Tensor, scale: Tensor, n: int):
    """``(pre, post, comb)`` before ε and Sinkhorn, tokens last, from the projections ``[n(n+2), N]``."""
    sizes = [n, n, n * n]
    factor = torch.repeat_interleave(scale, torch.tensor(sizes, device=scale.device), output_size=n * (n + 2))
    pre, post, comb = torch.addcmul(base[:, None], z_zN, factor[:, None]).split(sizes)
    return torch.sigmoid(pre), torch.sigmoid(post), comb.view(n, n, -1).softmax(1), factor


class _Pre(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_NnD, fn, base, scale, iterations, eps, norm_eps):
        full, (N, n, D) = full_dtype(h_NnD), h_NnD.shape
        h = h_NnD.to(full)
        u = h.view(N, n * D)
        inverse_N1 = inverse_rms(u, norm_eps)
        z_zN = (u @ fn.to(full).T).mul_(inverse_N1).T.contiguous()
        pre, post, comb, _ = _coefficients(z_zN, base.to(full), scale.to(full), n)
        comb, _ = _sinkhorn(comb.add_(eps), iterations, eps)
        collapsed = torch.bmm(pre.add_(eps).T.contiguous()[:, None], h).squeeze(1)
        ctx.save_for_backward(h_NnD, fn, base, scale, inverse_N1, z_zN)
        ctx.iterations, ctx.eps = iterations, eps
        return (
            collapsed.to(h_NnD.dtype),
            post.mul_(2).T.contiguous(),
            comb.permute(2, 0, 1).contiguous(),
            h_NnD,
        )

    @staticmethod
    def backward(ctx, d_collapsed, d_post, d_comb, d_h):
        h_NnD, fn, base, scale, inverse_N1, z_zN = ctx.saved_tensors
        full, (N, n, D), eps = full_dtype(h_NnD), h_NnD.shape, ctx.eps
        h, fn_full = h_NnD.to(full), fn.to(full)
        pre, post, soft, factor = _coefficients(z_zN, base.to(full), scale.to(full), n)
        _, steps = _sinkhorn(soft + eps, ctx.iterations, eps)
        grad = d_comb.permute(1, 2, 0).contiguous()
        for dim, sums, result in reversed(steps):
            # y = x / (Σx + ε):  dx = (dy - Σ dy·y) / (Σx + ε)
            grad = grad.sub_((grad * result).sum(dim, keepdim=True)).div_(sums)
        d_logit = torch.empty_like(z_zN)
        d_logit[2 * n :] = torch.mul(soft, grad - (grad * soft).sum(1, keepdim=True)).view(n * n, N)
        d_col = d_collapsed.to(full)
        d_logit[:n] = torch.bmm(d_col[:, None], h.transpose(1, 2)).view(N, n).T.mul_(pre * (1 - pre))
        d_logit[n : 2 * n] = d_post.T * (2 * post * (1 - post))
        d_base = d_logit.sum(1)
        by_part = (d_logit * z_zN).sum(1).split([n, n, n * n])
        d_scale = torch.stack([part.sum() for part in by_part])
        d_z = d_logit.mul_(factor[:, None])
        # z = (u·fnᵀ)·r with r = rsqrt(mean u² + ε):  du = r·dz·fn - u·r²·Σ(dz·z)/(nD)
        inner_N1 = (d_z * z_zN).sum(0)[:, None].mul_(inverse_N1.square()).div_(-n * D)
        d_raw = d_z.T * inverse_N1
        u = h.view(N, n * D)
        d_u = d_h.to(full).view(N, n * D).addmm_(d_raw, fn_full).addcmul_(u, inner_N1)
        d_u.view(N, n, D).addcmul_((pre + eps).T[..., None], d_col[:, None])
        d_fn = d_raw.T @ u
        return (
            d_u.view(N, n, D).to(h_NnD.dtype),
            d_fn.to(fn.dtype),
            d_base.to(base.dtype),
            d_scale.to(scale.dtype),
            None,
            None,
            None,
        )


def hyper_connection_pre(
    h_NnD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.hyper_connection_pre``. The handed-on streams must have one user: its gradient is added to."""
    return _Pre.apply(h_NnD, fn, base, scale, iterations, eps, norm_eps)
