"""The documented formulas of the fused operators of attention and indexer, as in ``_npu_formulas``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FORMULAS: dict[str, Callable] = {}


def _formula(namespace: str) -> Callable[[Callable], Callable]:
    def keep(function: Callable) -> Callable:
        FORMULAS[f"{namespace}::{function.__name__}"] = function
        return function

    return keep


of_torch_npu, of_extension = _formula("npu"), _formula("cann_ops_transformer")


def full(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x if x.dtype == torch.float64 else x.float()


# -- attention -----------------------------------------------------------------------------------------------------


def _attend(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, largest score and sum of exponentials of scores ``[B, H, T, X]`` over values ``[B, X, K]``."""
    top = scores.amax(-1, keepdim=True)
    p = (scores - top).exp()
    total = p.sum(-1, keepdim=True)
    return torch.einsum("bhtx,bxk->bthk", p / total, values), top, total


def _attend_backward(scores, top, total, query, values, out, grad, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and values by the given largest score and sum, all ``[…]`` as in ``_attend``."""
    p = (scores - top).exp() / total
    d_p = torch.einsum("bthk,bxk->bhtx", grad, values)
    d_s = p * (d_p - (grad * out).sum(-1).transpose(1, 2)[..., None]) * scale
    d_q = torch.einsum("bhtx,bxk->bthk", d_s, values)
    d_k = torch.einsum("bhtx,bthk->bxk", d_s, query)
    return d_q, d_k, torch.einsum("bhtx,bthk->bxk", p, grad)


def _masked(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = torch.einsum("bthk,bxk->bhtx", full(query), full(key[:, :, 0])) * scale
    return scores if mask is None else scores.masked_fill(mask, float("-inf"))


def _only_mode_0(**options) -> None:
    expected = {"input_layout": "BSND", "sparse_mode": 0, "keep_prob": 1.0, "sink": None}
    wrong = {name: value for name, value in options.items() if value != expected[name]}
    if wrong:
        raise ValueError(f"npu_fusion_attention: {wrong} has no formula here; add it.")


@of_torch_npu
def npu_fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    *,
    sparse_mode=0,
    sink=None,
) -> tuple:
    """In layout BSND with one head of keys, which are the values; a mask of True hides."""
    _only_mode_0(input_layout=input_layout, sparse_mode=sparse_mode, keep_prob=keep_prob, sink=sink)
    out, top, total = _attend(_masked(query, key, atten_mask, scale), full(value[:, :, 0]))
    return (
        out.to(query.dtype),
        top.expand(*top.shape[:-1], 8),
        total.expand(*top.shape[:-1], 8),
        None,
        0,
        0,
        0,
    )


@of_torch_npu
def npu_fusion_attention_grad(
    query,
    key,
    value,
    dy,
    head_num,
    input_layout,
    *,
    atten_mask=None,
    softmax_max=None,
    softmax_sum=None,
    attention_in=None,
    scale_value=1.0,
    keep_prob=1.0,
    sparse_mode=0,
    sink=None,
) -> tuple:
    _only_mode_0(input_layout=input_layout, sparse_mode=sparse_mode, keep_prob=keep_prob, sink=sink)
    scores = _masked(query, key, atten_mask, scale_value)
    operands = (full(x) for x in (query, value[:, :, 0], attention_in, dy))
    d_q, d_k, d_v = _attend_backward(
        scores, softmax_max[..., :1], softmax_sum[..., :1], *operands, scale_value
    )
    return (
        d_q.to(query.dtype),
        d_k[:, :, None].to(key.dtype),
        d_v[:, :, None].to(value.dtype),
        None,
        d_q.new_empty(0),
    )


def _hidden(index: Tensor, keys: int) -> Tensor:
    """``[B, 1, T, X]``: which keys are not among the selected ``[B, T, 1, S]``; -1 selects none."""
    B, T, _, _ = index.shape
    seen = torch.zeros(B, T, keys + 1, dtype=torch.bool, device=index.device)
    return ~seen.scatter_(2, torch.where(index < 0, keys, index)[:, :, 0].long(), True)[:, None, :, :-1]


@of_torch_npu
def npu_sparse_flash_attention(
    query,
    key,
    value,
    sparse_indices,
    scale_value,
    *,
    query_rope=None,
    key_rope=None,
    sparse_block_size=1,
    layout_query="BSND",
    layout_kv="BSND",
    sparse_mode=3,
    attention_mode=0,
    return_softmax_lse=False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Without a mask beyond the selection (mode 0), keys of nope and rope parts (attention mode 2)."""
    if (sparse_mode, attention_mode, sparse_block_size, layout_query, layout_kv) != (0, 2, 1, "BSND", "BSND"):
        raise ValueError("npu_sparse_flash_attention: this mode has no formula here; add it.")
    q, k = torch.cat([query, query_rope], -1), torch.cat([key, key_rope], -1)
    scores = _masked(q, k, _hidden(sparse_indices, key.shape[1]), scale_value)
    out, top, total = _attend(scores, full(value[:, :, 0]))
    none = total.new_empty(0)
    stats = [x.squeeze(-1).transpose(1, 2)[:, None] if return_softmax_lse else none for x in (top, total)]
    return out.to(query.dtype), *stats


@of_torch_npu
def npu_sparse_flash_attention_grad(
    query,
    key,
    value,
    sparse_indices,
    d_out,
    out,
    softmax_max,
    softmax_sum,
    scale_value,
    sparse_block_size,
    query_rope=None,
    key_rope=None,
    *,
    layout="BSND",
    sparse_mode=3,
    attention_mode=0,
) -> tuple[Tensor, ...]:
    if (sparse_mode, attention_mode, sparse_block_size, layout) != (0, 2, 1, "BSND"):
        raise ValueError("npu_sparse_flash_attention_grad: this mode has no formula here; add it.")
    q, k = full(torch.cat([query, query_rope], -1)), full(torch.cat([key, key_rope], -1))
    scores = _masked(q, k, _hidden(sparse_indices, key.shape[1]), scale_value)
    top, total = (x[:, 0].transpose(1, 2)[..., None] for x in (softmax_max, softmax_sum))
    p = (scores - top).exp() / total
    grad, values = full(d_out), full(value[:, :, 0])
    d_p = torch.einsum("bthk,bxk->bhtx", grad, values)
    d_s = p * (d_p - (grad * full(out)).sum(-1).transpose(1, 2)[..., None]) * scale_value
    d_q = torch.einsum("bhtx,bxk->bthk", d_s, k[:, :, 0]).to(query.dtype)
    d_k = torch.einsum("bhtx,bthk->bxk", d_s, q)[:, :, None].to(key.dtype)
    d_v = torch.einsum("bhtx,bthk->bxk", p, grad)[:, :, None].to(value.dtype)
    width = query.shape[-1]
    return d_q[..., :width], d_k[..., :width], d_v, d_q[..., width:], d_k[..., width:]


# -- indexer -------------------------------------------------------------------------------------------------------


@of_torch_npu
def npu_lightning_indexer(
    query,
    key,
    weights,
    *,
    actual_seq_lengths_query=None,
    actual_seq_lengths_key=None,
    layout_query="BSND",
    layout_key="BSND",
    sparse_count=2048,
    sparse_mode=3,
    return_value=False,
) -> tuple[Tensor, Tensor]:
    """In layout TND with the right-aligned causal mask (mode 3); absent entries are -1 and -inf, and come last."""
    if (layout_query, layout_key, sparse_mode) != ("TND", "TND", 3):
        raise ValueError("npu_lightning_indexer: this mode has no formula here; add it.")
    index = torch.full((len(query), 1, sparse_count), -1, dtype=torch.int32, device=query.device)
    values = torch.full(index.shape, float("-inf"), dtype=query.dtype, device=query.device)
    q_start = k_start = 0
    for q_end, k_end in zip(actual_seq_lengths_query.tolist(), actual_seq_lengths_key.tolist(), strict=True):
        q, k, w = query[q_start:q_end], key[k_start:k_end, 0], weights[q_start:q_end]
        scores = (torch.einsum("qhd,kd->qhk", full(q), full(k)).relu() * w[..., None]).sum(1)
        hidden = torch.arange(len(k)) > torch.arange(len(q))[:, None] + len(k) - len(q)
        found = scores.masked_fill(hidden.to(scores.device), float("-inf")).topk(
            min(sparse_count, len(k)), -1
        )
        part = (slice(q_start, q_end), 0, slice(0, found.values.shape[-1]))
        values[part] = found.values.to(values.dtype)
        index[part] = torch.where(found.values == float("-inf"), -1, found.indices).to(torch.int32)
        q_start, k_start = q_end, k_end
    return index, values if return_value else values.new_empty(0)


def index_gradients(query, key, weights, d_scores, index) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``Σ_h w_h relu(q_h · k_i)`` at the selected ``[B, T, S]``; none of -1."""
    B, T, _, K = query.shape
    place = index.clamp(min=0).long()
    keys = key[:, :, 0].gather(1, place.reshape(B, -1, 1).expand(-1, -1, K)).view(B, T, -1, K)
    dots = torch.einsum("bthk,btsk->bths", full(query), full(keys))
    d_scores = (full(d_scores) * (index >= 0))[:, :, None]
    d_dots = d_scores * weights[..., None] * (dots > 0)
    d_keys = torch.einsum("bths,bthk->btsk", d_dots, full(query)).reshape(B, -1, K)
    zeros = torch.zeros(B, key.shape[1], K, dtype=d_keys.dtype, device=d_keys.device)
    d_key = zeros.scatter_add(1, place.reshape(B, -1, 1).expand(-1, -1, K), d_keys)[:, :, None]
    d_query = torch.einsum("bths,btsk->bthk", d_dots, full(keys))
    d_weights = (dots.relu() * d_scores).sum(-1)
    return d_query.to(query.dtype), d_key.to(key.dtype), d_weights.to(weights.dtype)


@of_torch_npu
def npu_lightning_indexer_grad(
    query, key, dy, sparse_indices, weights, *, layout="BSND", sparse_mode=3
) -> tuple[Tensor, Tensor, Tensor]:
    if (layout, sparse_mode) != ("BSND", 0):
        raise ValueError("npu_lightning_indexer_grad: this mode has no formula here; add it.")
    return index_gradients(query, key, weights, dy[:, :, 0], sparse_indices[:, :, 0])
