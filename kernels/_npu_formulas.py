"""The documented formulas of the fused operators that ``npu.py`` implementations call, in plain torch.

Each takes the arguments of its operator by the names and in the order of its schema, and returns what the document
says; ``kernels._npu.replaced(FORMULAS)`` puts them in the operators' place. They are the documents' words, not the
kernels': in fp32 or fp64, dense where the kernels are sparse, for small shapes. Sources: the documents of op-plugin
(torch_npu) and of ops-transformer (CANN's extension). Those of attention and indexer are in
``_npu_formulas_attention``, those of the extension in ``_npu_formulas_extension``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu_formulas_extension  # noqa: F401  (it adds its formulas to the table)
from kernels._npu_formulas_attention import FORMULAS, full, of_torch_npu

__all__ = ["FORMULAS"]


# -- norms, angles, losses -----------------------------------------------------------------------------------------


@of_torch_npu
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    x = full(input)
    rstd = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x * rstd * gamma).to(input.dtype), rstd


@of_torch_npu
def npu_rotary_mul(input, r1, r2, rotary_mode="half", rotate=None) -> Tensor:
    if rotary_mode == "half":
        first, second = input.chunk(2, -1)
        other = torch.cat([-second, first], -1)
    else:
        other = torch.stack([-input[..., 1::2], input[..., ::2]], -1).flatten(-2)
    return input * r1 + other * r2


@of_torch_npu
def npu_cross_entropy_loss(
    input,
    target,
    weight=None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    lse_square_scale_for_zloss=0.0,
    return_zloss=False,
) -> tuple[Tensor, ...]:
    log_prob = input - input.logsumexp(-1, keepdim=True)
    loss = -log_prob.gather(1, target[:, None]).squeeze(1)
    loss = {"none": loss, "sum": loss.sum()[None], "mean": loss.mean()[None]}[reduction]
    return loss, log_prob, loss.new_empty(0), loss.new_empty(0)


@of_torch_npu
def npu_cross_entropy_loss_backward(
    grad_loss,
    log_prob,
    target,
    weight=None,
    grad_zloss=None,
    lse_for_zloss=None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    lse_square_scale_for_zloss=0.0,
) -> Tensor:
    if reduction == "mean":
        grad_loss = grad_loss / len(target)
    grad = grad_loss.expand(len(target))[:, None]
    return (log_prob.exp() * grad).scatter_add(1, target[:, None], -grad)


# -- experts -------------------------------------------------------------------------------------------------------


@of_torch_npu
def npu_moe_gating_top_k(
    x,
    k,
    *,
    bias=None,
    input_ids=None,
    tid2eid=None,
    k_group=1,
    group_count=1,
    group_select_mode=0,
    renorm=0,
    norm_type=0,
    out_flag=False,
    routed_scaling_factor=1.0,
    eps=1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = torch.sigmoid(full(x)) if norm_type == 1 else full(x).softmax(-1)
    if tid2eid is None:
        ranked = norm if bias is None else norm + bias
        chosen = ranked.argsort(dim=-1, descending=True, stable=True)[:, :k]
    else:
        chosen = tid2eid[input_ids].long()
    y = norm.gather(1, chosen)
    if norm_type == 1:
        y = y / (y.sum(-1, keepdim=True) + eps)
    none = norm.new_empty(0)
    return (y * routed_scaling_factor).to(x.dtype), chosen.to(torch.int32), norm if out_flag else none


@of_torch_npu
def npu_moe_token_permute(tokens, indices, num_out_tokens=None, padded_mode=False) -> tuple[Tensor, Tensor]:
    k = 1 if indices.dim() == 1 else indices.shape[1]
    order = indices.reshape(-1).argsort(stable=True)
    return tokens[order // k], order.argsort(stable=True).to(torch.int32)


@of_torch_npu
def npu_moe_token_unpermute(
    permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None
) -> Tensor:
    rows = permuted_tokens[sorted_indices.long()]
    if probs is None:
        return rows
    rows = full(rows).view(*probs.shape, -1)
    return (rows * probs[..., None]).sum(1).to(permuted_tokens.dtype)


@of_torch_npu
def npu_grouped_matmul(
    x, weight, *, group_list, split_item=0, group_type=None, group_list_type=0, **unused
) -> list[Tensor]:
    """Of its many modes those in which x, weight and output are one tensor each."""
    if len(x) != 1 or len(weight) != 1 or split_item not in (2, 3) or group_type not in (0, 2):
        raise ValueError("npu_grouped_matmul: this mode has no formula here; add it.")
    sizes = group_list if group_list_type == 1 else group_list.diff(prepend=group_list.new_zeros(1))
    (left,), (right,), sizes = x, weight, sizes.tolist()
    if group_type == 0:
        return [torch.cat([a @ b for a, b in zip(left.split(sizes), right, strict=True)])]
    pairs = zip(left.split(sizes, 1), right.split(sizes), strict=True)
    return [torch.stack([a @ b for a, b in pairs])]


@of_torch_npu
def npu_clipped_swiglu(
    x, *, group_index=None, dim=-1, alpha=1.702, limit=7.0, bias=1.0, interleaved=True
) -> Tensor:
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim)
    a, b = full(a).clamp(max=limit), full(b).clamp(-limit, limit)
    return (a * torch.sigmoid(alpha * a) * (b + bias)).to(x.dtype)
