"""Routed experts as grouped products over tokens sorted by expert; saves the input and the pre-activations only.

The weight of a token multiplies the activation before the second product, so that the gradient of the weight needs no
output of an expert, and the sum over a token's experts is a gather and a plain sum. Legend: M = N·k sorted rows,
G = 2F; others as in ``reference``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._products import grouped_mm, grouped_outer
from kernels._support import any_device, apply, count, gather_rows, working_dtype, workspace


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    """Grouped products know no fp64."""
    return "grouped products take no float64" if dtype == torch.float64 else any_device(device_type, dtype)


def within(hidden: Tensor, limit: float) -> bool:
    """Whether no value is beyond the limit, so that clamping can be left out: one look instead of six passes.

    Only asked on CPU; elsewhere the answer would make the host wait for the device.
    """
    if hidden.device.type != "cpu" or not hidden.numel():
        return False
    low, high = torch.aminmax(hidden)
    return bool(low >= -limit) and bool(high <= limit)


def swiglu(gate: Tensor, up: Tensor, limit: float, inside: bool) -> Tensor:
    """``silu(min(gate, limit)) · clamp(up, ±limit)`` in the workspace; ``inside``: nothing to clamp."""
    low, high = (gate, up) if inside else (gate.clamp(max=limit), up.clamp(-limit, limit))
    return torch.sigmoid(low, out=workspace(2, gate.shape, gate)).mul_(low).mul_(high)


def swiglu_backward(
    gate: Tensor, up: Tensor, grad: Tensor, share: Tensor, limit: float, inside: bool, out: Tensor
):
    """Backward of ``share · swiglu``: gradients of gate and up into ``out``; returns share · swiglu and d share.

    ``grad`` belongs to the product; it is written over.
    """
    width = gate.shape[-1]
    low, high = (gate, up) if inside else (gate.clamp(max=limit), up.clamp(-limit, limit))
    d_gate, d_up = out[..., :width], out[..., width:]
    sigmoid = torch.sigmoid(low, out=workspace(2, gate.shape, gate))
    silu = torch.mul(low, sigmoid, out=d_up)
    act = torch.mul(silu, high, out=workspace(3, gate.shape, gate))
    d_share = torch.linalg.vecdot(grad, act)
    grad.mul_(share)
    # silu' = σ(x)·(1 + x·(1 - σ(x))) = silu + σ·(1 - silu)
    torch.addcmul(silu, sigmoid, 1 - silu, out=d_gate).mul_(grad).mul_(high)
    d_up.mul_(grad)
    if not inside:
        d_gate.mul_(gate <= limit)
        d_up.mul_(up.abs() <= limit)
    return act.mul_(share), d_share


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, experts_Nk, weights_Nk, gate_up_EGD, down_EDF, limit):
        work, (E, G, _), k = working_dtype(x_ND), gate_up_EGD.shape, experts_Nk.shape[1]
        order_M = experts_Nk.reshape(-1).argsort(stable=True)
        ends_E = count(experts_Nk.reshape(-1), E).cumsum(0).to(torch.int32)
        sorted_MD = gather_rows(0, x_ND.to(work), order_M // k)
        hidden_MG = grouped_mm(sorted_MD, gate_up_EGD.to(work).transpose(1, 2), ends_E)
        share_M1 = weights_Nk.to(work).reshape(-1, 1).index_select(0, order_M)
        ctx.inside = within(hidden_MG, limit)
        act_MF = swiglu(hidden_MG[:, : G // 2], hidden_MG[:, G // 2 :], limit, ctx.inside).mul_(share_M1)
        room_MD = workspace(4, sorted_MD.shape, sorted_MD)
        out_MD = grouped_mm(act_MF, down_EDF.to(work).transpose(1, 2), ends_E, room_MD)
        place_M = torch.empty_like(order_M).scatter_(
            0, order_M, torch.arange(len(order_M), device=order_M.device)
        )
        ctx.save_for_backward(x_ND, order_M, place_M, ends_E, hidden_MG, share_M1, gate_up_EGD, down_EDF)
        ctx.limit, ctx.k, ctx.share_dtype = limit, k, weights_Nk.dtype
        return _combine(out_MD, place_M, k).to(x_ND.dtype)

    @staticmethod
    def backward(ctx, grad_ND):
        x_ND, order_M, place_M, ends_E, hidden_MG, share_M1, gate_up_EGD, down_EDF = ctx.saved_tensors
        work, k, width, limit = hidden_MG.dtype, ctx.k, hidden_MG.shape[1] // 2, ctx.limit
        token_M = order_M // k
        gate, up = hidden_MG[:, :width], hidden_MG[:, width:]
        grad_MD = gather_rows(0, grad_ND.to(work), token_M)
        room_MF = workspace(4, gate.shape, hidden_MG)
        d_product_MF = grouped_mm(grad_MD, down_EDF.to(work), ends_E, room_MF)  # gradient of share · act
        d_hidden = workspace(1, hidden_MG.shape, hidden_MG)
        product_MF, d_share_M = swiglu_backward(gate, up, d_product_MF, share_M1, limit, ctx.inside, d_hidden)
        d_down = grouped_outer(grad_MD, product_MF, ends_E)
        sorted_MD = gather_rows(0, x_ND.to(work), token_M)
        d_gate_up = grouped_outer(d_hidden, sorted_MD, ends_E)
        d_rows_MD = grouped_mm(
            d_hidden, gate_up_EGD.to(work), ends_E, workspace(4, sorted_MD.shape, sorted_MD)
        )
        d_x = _combine(d_rows_MD, place_M, k).to(x_ND.dtype)
        d_weights = d_share_M.index_select(0, place_M).view(-1, k).to(ctx.share_dtype)
        return d_x, None, d_weights, d_gate_up.to(gate_up_EGD.dtype), d_down.to(down_EDF.dtype), None


def _combine(rows_MD: Tensor, place_M: Tensor, k: int) -> Tensor:
    """Sum of each token's k sorted rows: a gather, so deterministic."""
    if rows_MD.device.type == "cpu" and rows_MD.dtype == torch.float32:
        return F.embedding_bag(
            place_M.view(-1, k), rows_MD, mode="sum"
        )  # gathers and adds without a copy between
    return gather_rows(0, rows_MD, place_M).view(-1, k, rows_MD.shape[1]).sum(1)


def grouped_swiglu(
    x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, limit: float
) -> Tensor:
    """See ``reference.grouped_swiglu``.

    Raises:
        ValueError: D or F that grouped products can't address (rows must be multiples of 16 bytes).
    """
    step = 16 // working_dtype(x_ND).itemsize
    if x_ND.shape[-1] % step or down_EDF.shape[-1] % step:
        raise ValueError(
            f"grouped_swiglu: model width {x_ND.shape[-1]} and expert width {down_EDF.shape[-1]} must each be a "
            f"multiple of {step}; change the configuration or force grouped_swiglu=reference."
        )
    return apply(_Experts, x_ND, experts_Nk, weights_Nk, gate_up_EGD, down_EDF, limit)
