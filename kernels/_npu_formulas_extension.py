"""The documented formulas of the operators of CANN's extension ``cann_ops_transformer``, as in ``_npu_formulas``."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kernels._npu_formulas_attention import full, index_gradients, of_extension


@of_extension
def sparse_lightning_indexer_kl_loss_grad_metadata(num_heads_q, num_heads_k, head_dim, **layout) -> Tensor:
    return torch.zeros(64, dtype=torch.int32)


@of_extension
def sparse_lightning_indexer_kl_loss_grad(
    q,
    k,
    w,
    sparse_indices,
    attn_softmax_l1_norm,
    *,
    cmp_residual_k,
    metadata,
    layout_q,
    layout_k,
    mask_mode,
    cmp_ratio,
) -> tuple[Tensor, ...]:
    """In layout BSND; a query at t sees entries below (t + 1) div ratio of its row (mode 3)."""
    if (layout_q, layout_k, mask_mode) != ("BSND", "BSND", 3):
        raise ValueError("sparse_lightning_indexer_kl_loss_grad: this mode has no formula here; add it.")
    index, target = sparse_indices[:, :, 0], attn_softmax_l1_norm[:, :, 0]
    steps = torch.arange(q.shape[1], device=q.device) + (
        k.shape[1] * cmp_ratio + cmp_residual_k[:, None] - q.shape[1]
    )
    seen = (index >= 0) & (index < ((steps + 1) // cmp_ratio)[..., None])
    scores = torch.einsum("bthk,bxk->bthx", full(q), full(k[:, :, 0])).relu()
    scores = (scores * w[..., None]).sum(2).gather(2, index.clamp(min=0).long())
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    d_scores = p * target.sum(-1, keepdim=True) - target
    return *index_gradients(q, k, w, d_scores, torch.where(seen, index, -1)), p[:, :, None]


# -- attention of CANN's extension ---------------------------------------------------------------------------------


@of_extension
def sparse_flash_mla_metadata(num_heads_q, num_heads_kv, head_dim, **layout) -> Tensor:
    return torch.zeros(1024, dtype=torch.int32)


@of_extension
def sparse_flash_mla_grad_metadata(num_heads_q, num_heads_kv, head_dim, **layout) -> Tensor:
    return torch.zeros(1024, dtype=torch.int32)


def _mla(q, ori_kv, cmp_kv, sinks, index, layout, scale) -> tuple[Tensor, Tensor]:
    """Output and logarithm of the denominator (the sink in it) of every document by itself."""
    if (layout["layout_q"], layout["ori_mask_mode"], layout["ori_win_right"]) != ("TND", 4, 0):
        raise ValueError("sparse_flash_mla: this mode has no formula here; add it.")
    ratio, outs, lses = layout["cmp_ratio"], [], []
    ends, compressed = layout["cu_seqlens_q"].tolist(), layout["cu_seqlens_cmp_kv"]
    entry_ends = [0] * len(ends) if compressed is None else compressed.tolist()
    for document, (start, end) in enumerate(itertools.pairwise(ends)):
        steps = torch.arange(end - start, device=q.device)
        back = steps[:, None] - steps
        seen, keys = (back >= 0) & (back <= layout["ori_win_left"]), ori_kv[start:end, 0]
        first, last = entry_ends[document : document + 2]
        if last > first:
            slots = torch.arange(last - first, device=q.device)
            visible = slots < ((steps + 1) // ratio)[:, None]
            if index is not None:
                chosen = torch.zeros(len(steps), last - first + 1, dtype=torch.bool, device=q.device)
                own = index[start:end, 0].long()
                visible &= chosen.scatter_(1, torch.where(own < 0, last - first, own), True)[:, :-1]
            seen, keys = torch.cat([seen, visible], 1), torch.cat([keys, cmp_kv[first:last, 0]])
        scores = torch.einsum("thk,xk->thx", full(q[start:end]), full(keys)) * scale
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        lse = torch.cat([scores, sinks[:, None].expand(*scores.shape[:2], 1)], -1).logsumexp(-1)
        outs.append(torch.einsum("thx,xk->thk", (scores - lse[..., None]).exp(), full(keys)))
        lses.append(lse)
    return torch.cat(outs).to(q.dtype), torch.cat(lses)[None]


@of_extension
def sparse_flash_mla(
    q,
    *,
    ori_kv=None,
    cmp_kv=None,
    cmp_sparse_indices=None,
    sinks=None,
    metadata=None,
    softmax_scale=1.0,
    return_softmax_lse=False,
    **layout,
) -> tuple[Tensor, Tensor]:
    return _mla(q, ori_kv, cmp_kv, sinks, cmp_sparse_indices, layout, softmax_scale)


@of_extension
def sparse_flash_mla_grad(
    q,
    dout,
    attn_out,
    softmax_lse,
    ori_kv=None,
    cmp_kv=None,
    *,
    cmp_sparse_indices=None,
    sinks=None,
    metadata=None,
    softmax_scale=1.0,
    **layout,
) -> tuple[Tensor | None, ...]:
    inputs = [x.detach().requires_grad_() for x in (q, ori_kv, sinks)]
    inputs.append(None if cmp_kv is None else cmp_kv.detach().requires_grad_())
    with torch.enable_grad():
        query, original, sink, entries = inputs
        out, _ = _mla(query, original, entries, sink, cmp_sparse_indices, layout, softmax_scale)
    found = torch.autograd.grad(out, [x for x in inputs if x is not None], dout)
    return found[0], found[1], found[3] if cmp_kv is not None else None, found[2], None, None


# -- streams -------------------------------------------------------------------------------------------------------


def _streams(x, phi, alpha, bias, n, iterations, hc_eps, norm_eps) -> tuple[Tensor, Tensor, Tensor]:
    wide = full(x)
    u = wide.flatten(-2)
    z = (u * (u.square().mean(-1, keepdim=True) + norm_eps).rsqrt()) @ phi.T
    pre, post, res = z.split([n, n, n * n], -1)
    b_pre, b_post, b_res = bias.split([n, n, n * n])
    pre = torch.sigmoid(alpha[0] * pre + b_pre) + hc_eps
    post = 2 * torch.sigmoid(alpha[1] * post + b_post)
    res = (alpha[2] * res + b_res).unflatten(-1, (n, n)).softmax(-1) + hc_eps
    res = res / (res.sum(-2, keepdim=True) + hc_eps)
    for _ in range(iterations - 1):
        res = res / (res.sum(-1, keepdim=True) + hc_eps)
        res = res / (res.sum(-2, keepdim=True) + hc_eps)
    return (wide * pre[..., None]).sum(-2).to(x.dtype), post, res.flatten(-2)


@of_extension
def mhc_pre_sinkhorn(x, phi, alpha, bias, hcMult, numIters, hcEps=1e-6, normEps=1e-6, outFlag=True) -> tuple:
    """With its five intermediate results, which here are what its backward takes to make them again."""
    kept = (
        torch.tensor([float(numIters), normEps], dtype=torch.float64),
        *(phi.new_empty(0) for _ in range(4)),
    )
    return *_streams(x, phi, alpha, bias, hcMult, numIters, hcEps, normEps), *kept


@of_extension
def mhc_pre_sinkhorn_backward(
    grad_hin,
    grad_h_post,
    grad_h_res,
    x,
    phi,
    alpha,
    bias,
    h_pre,
    hc_before_norm,
    inv_rms,
    sum_out,
    norm_out,
    hc_eps,
) -> tuple[Tensor, ...]:
    inputs = [t.detach().requires_grad_() for t in (x, phi, alpha, bias)]
    iterations, norm_eps = h_pre.tolist()
    with torch.enable_grad():
        outputs = _streams(*inputs, x.shape[-2], int(iterations), hc_eps, norm_eps)
    return torch.autograd.grad(outputs, inputs, (grad_hin, grad_h_post, grad_h_res))


@of_extension
def mhc_post(x, h_res, h_out, h_post) -> Tensor:
    mixed = torch.einsum("...ji,...jd->...id", h_res, full(x))
    return (mixed + h_post[..., None] * full(h_out)[..., None, :]).to(x.dtype)


@of_extension
def mhc_post_backward(grad_output, x, h_res, h_out, h_post) -> tuple[Tensor, ...]:
    inputs = [t.detach().requires_grad_() for t in (x, h_res, h_out, h_post)]
    with torch.enable_grad():
        out = mhc_post(*inputs)
    return torch.autograd.grad(out, inputs, grad_output)
