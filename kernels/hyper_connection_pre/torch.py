"""mHC, the way in, with its own backward: saves the streams, 40 coefficients and Sinkhorn's divisors of each token.

The iterations work on ``[j, k, N]`` (tokens last), where sums over four streams are additions of whole vectors. The
streams pass through, so that the gradient of their mixing arrives here and is added to in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import apply, full_dtype
from kernels.rms_norm.torch import inverse_rms


def _dimensions(iterations: int) -> list[int]:
    """Which sums are made one, step by step: columns, then rows and columns in turn."""
    return [0, *(1, 0) * (iterations - 1)]


def _sinkhorn_(comb_jkN: Tensor, iterations: int, eps: float) -> Tensor:
    """Balance the matrices in place; returns what each step divided by, ``[steps, n, N]``."""
    dims = _dimensions(iterations)
    sums = comb_jkN.new_empty(len(dims), *comb_jkN.shape[1:])
    for dim, total in zip(dims, sums, strict=True):
        torch.sum(comb_jkN, dim, out=total)
        comb_jkN.div_(total.add_(eps).unsqueeze(dim))
    return sums


def _sinkhorn_backward(grad_jkN: Tensor, comb_jkN: Tensor, sums: Tensor, iterations: int) -> Tensor:
    """Gradient of the unbalanced matrices from that of the balanced ones.

    For y = x / s with s = Σx + ε:  dx = (dy - Σ dy·y) / s. Of the products dx·x = dy·y - y·Σ dy·y, no step divides, and
    x = y·s comes back from y. Writes over ``grad_jkN``.
    """
    product, y = grad_jkN.mul_(comb_jkN), comb_jkN.clone()
    for dim, total in zip(reversed(_dimensions(iterations)), reversed(sums.unbind(0)), strict=True):
        product.addcmul_(y, product.sum(dim, keepdim=True), value=-1)
        y.mul_(total.unsqueeze(dim))
    return product.div_(y)


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
        sums = _sinkhorn_(comb.add_(eps), iterations, eps)
        collapsed = torch.bmm(pre.add_(eps).T.contiguous()[:, None], h).squeeze(1)
        ctx.save_for_backward(h_NnD, fn, base, scale, inverse_N1, z_zN, comb, sums)
        ctx.iterations, ctx.eps = iterations, eps
        return (
            collapsed.to(h_NnD.dtype),
            post.mul_(2).T.contiguous(),
            comb.permute(2, 0, 1).contiguous(),
            h_NnD,
        )

    @staticmethod
    def backward(ctx, d_collapsed, d_post, d_comb, d_h):
        h_NnD, fn, base, scale, inverse_N1, z_zN, comb, sums = ctx.saved_tensors
        full, (N, n, D) = full_dtype(h_NnD), h_NnD.shape
        h, fn_full = h_NnD.to(full), fn.to(full)
        pre, post, soft, factor = _coefficients(z_zN, base.to(full), scale.to(full), n)
        grad = d_comb.permute(1, 2, 0).contiguous()
        grad = _sinkhorn_backward(grad, comb, sums, ctx.iterations)
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
        d_u.view(N, n, D).addcmul_((pre + ctx.eps).T[..., None], d_col[:, None])
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
    return apply(_Pre, h_NnD, fn, base, scale, iterations, eps, norm_eps)
