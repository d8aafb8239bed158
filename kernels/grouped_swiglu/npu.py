"""Routed experts by ``npu_grouped_matmul`` and ``npu_clipped_swiglu``, neither of which has a gradient in torch_npu.

Ours: of the rows, the product with the transposed weight; of a weight, the product grouped over the rows
(``group_type`` 2); of the activation, elementwise. Tokens go to their experts and back by ``npu_moe_token_permute``
and ``_unpermute``. As in ``torch.py`` a token's weight multiplies the activation, so that its gradient needs no output
of an expert. V4's clipped SwiGLU is alpha 1, bias 0, halves one after the other. Limits (op-plugin's documents): at
most 1024 experts, inner dimensions below 65,536. Legend as in ``torch.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu
from kernels._support import apply, count
from kernels.expert_dispatch.npu import MOST
from kernels.grouped_swiglu.torch import grouped_swiglu as by_torch
from kernels.grouped_swiglu.torch import swiglu_backward

OPERATORS = (
    "npu::npu_grouped_matmul",
    "npu::npu_clipped_swiglu",
    "npu::npu_moe_token_permute",
    "npu::npu_moe_token_unpermute",
)
MATMUL, SWIGLU, PERMUTE, UNPERMUTE = OPERATORS
unsupported = _npu.runs(OPERATORS)


def rows_by_expert(rows_MK: Tensor, weight_EKN: Tensor, sizes_E: Tensor) -> Tensor:
    """Each expert's rows times its weight ``[M, N]``; a transposed view is taken as it is."""
    found = _npu.call(
        MATMUL, [rows_MK], [weight_EKN], group_list=sizes_E, split_item=3, group_type=0, group_list_type=1
    )
    return found[0]


def weight_gradient(left_MK: Tensor, right_MN: Tensor, sizes_E: Tensor) -> Tensor:
    """``leftᵀ · right`` over each expert's rows, ``[E, K, N]``."""
    found = _npu.call(
        MATMUL, [left_MK.T], [right_MN], group_list=sizes_E, split_item=3, group_type=2, group_list_type=1
    )
    return found[0]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, experts_Nk, weights_Nk, gate_up_EGD, down_EDF, limit):
        k, work = experts_Nk.shape[1], x_ND.dtype
        sizes_E = count(experts_Nk.reshape(-1), len(gate_up_EGD))
        sorted_MD, place_M = _npu.call(PERMUTE, x_ND, experts_Nk.to(torch.int32))
        hidden_MG = rows_by_expert(sorted_MD, gate_up_EGD.to(work).transpose(1, 2), sizes_E)
        act_MF = _npu.call(SWIGLU, hidden_MG, dim=-1, alpha=1.0, limit=limit, bias=0.0, interleaved=False)
        share_M1 = torch.empty(len(place_M), 1, dtype=work, device=x_ND.device)
        share_M1[place_M.long(), 0] = weights_Nk.to(work).reshape(-1)
        out_MD = rows_by_expert(act_MF * share_M1, down_EDF.to(work).transpose(1, 2), sizes_E)
        ctx.save_for_backward(x_ND, experts_Nk, place_M, sizes_E, hidden_MG, share_M1, gate_up_EGD, down_EDF)
        ctx.limit, ctx.share_dtype = limit, weights_Nk.dtype
        return _npu.call(UNPERMUTE, out_MD, place_M, probs=x_ND.new_ones(len(x_ND), k))

    @staticmethod
    def backward(ctx, grad_ND):
        x_ND, experts_Nk, place_M, sizes_E, hidden_MG, share_M1, gate_up_EGD, down_EDF = ctx.saved_tensors
        work, k, width = hidden_MG.dtype, experts_Nk.shape[1], hidden_MG.shape[1] // 2
        chosen = experts_Nk.to(torch.int32)
        grad_MD, _ = _npu.call(PERMUTE, grad_ND.to(work), chosen)
        d_product_MF = rows_by_expert(grad_MD, down_EDF.to(work), sizes_E)  # gradient of share · act
        d_hidden_MG = torch.empty_like(hidden_MG)
        product_MF, d_share_M = swiglu_backward(
            hidden_MG[:, :width], hidden_MG[:, width:], d_product_MF, share_M1, ctx.limit, False, d_hidden_MG
        )
        d_down = weight_gradient(grad_MD, product_MF, sizes_E).to(down_EDF.dtype)
        sorted_MD, _ = _npu.call(PERMUTE, x_ND, chosen)
        d_gate_up = weight_gradient(d_hidden_MG, sorted_MD, sizes_E).to(gate_up_EGD.dtype)
        d_rows_MD = rows_by_expert(d_hidden_MG, gate_up_EGD.to(work), sizes_E)
        d_x = _npu.call(UNPERMUTE, d_rows_MD, place_M, probs=x_ND.new_ones(len(x_ND), k))
        d_weights = d_share_M.index_select(0, place_M).view(-1, k).to(ctx.share_dtype)
        return d_x, None, d_weights, d_gate_up, d_down, None


def grouped_swiglu(
    x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, limit: float
) -> Tensor:
    """See ``reference.grouped_swiglu``."""
    (E, G, D), rows = gate_up_EGD.shape, experts_Nk.numel()
    if _npu.outside(
        "grouped_swiglu",
        (not 2 <= E <= 1024, f"npu_grouped_matmul takes 2 to 1024 experts, not {E}"),
        (max(G, D) >= 65536, f"npu_grouped_matmul takes widths below 65536, not {max(G, D)}"),
        (rows >= MOST, f"npu_moe_token_permute takes fewer than {MOST} assignments"),
        (not rows, "npu_grouped_matmul takes no empty tensor"),
    ):
        return by_torch(x_ND, experts_Nk, weights_Nk, gate_up_EGD, down_EDF, limit)
    return apply(_Experts, x_ND, experts_Nk, weights_Nk, gate_up_EGD, down_EDF, limit)
