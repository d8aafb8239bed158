"""Routing by ``npu_moe_gating_top_k``: scores, selection with a bias or a given table, in one pass over the logits.

Its norms are softmax and sigmoid: V4's sqrt(softplus) is none of them and falls back. A given choice of experts (hash
layers, replayed routing) reaches it as a table of its own, ``tid2eid`` with a row a token. The document calls it an
operator for inference and torch_npu's gradient has no meta function, so the gradient is ours: that of the scores,
which the operator hands out. Limits (op-plugin's document): 3 to 2048 experts. Legend as in ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu
from kernels._support import apply
from kernels.routing.torch import _Logits
from kernels.routing.torch import routing as by_torch

OPERATORS = ("npu::npu_moe_gating_top_k",)
unsupported = _npu.runs(OPERATORS)
NORMS = {"softmax": 0, "sigmoid": 1}
FLOOR = 1e-20  # as in ``reference.choose``


class _Gate(torch.autograd.Function):
    """``(experts, weights, scores)`` of logits in at least fp32."""

    @staticmethod
    def forward(ctx, logits_NE, k, scoring, scaling, bias_E, experts_Nk):
        table = {}
        if experts_Nk is not None:
            rows_N = torch.arange(len(logits_NE), device=logits_NE.device)
            table = {"input_ids": rows_N, "tid2eid": experts_Nk}
        y_Nk, found_Nk, scores_NE = _npu.call(
            OPERATORS[0],
            logits_NE,
            k,
            bias=None if bias_E is None else bias_E.to(logits_NE.dtype),
            norm_type=NORMS[scoring],
            out_flag=True,
            routed_scaling_factor=1.0,
            eps=FLOOR,
            **table,
        )
        scores_NE, experts = (
            scores_NE.to(logits_NE.dtype),
            found_Nk.long() if experts_Nk is None else experts_Nk,
        )
        # With sigmoid it divides by the sum of the chosen, with softmax it leaves that to us.
        chosen_Nk = scores_NE.gather(1, experts)
        total_N1 = chosen_Nk.sum(-1, keepdim=True) + FLOOR
        y_Nk = y_Nk if scoring == "sigmoid" else y_Nk / total_N1
        ctx.save_for_backward(scores_NE, experts, y_Nk, total_N1)
        ctx.scoring, ctx.scaling = scoring, scaling
        ctx.mark_non_differentiable(experts)
        return experts, y_Nk * scaling, scores_NE

    @staticmethod
    def backward(ctx, _experts, d_weights_Nk, d_scores_NE):
        scores_NE, experts_Nk, y_Nk, total_N1 = ctx.saved_tensors
        # y = s / Σs of the chosen
        d_y = d_weights_Nk * ctx.scaling
        d_chosen = (d_y - (d_y * y_Nk).sum(-1, keepdim=True)) / total_N1
        d_s = d_scores_NE.scatter_add(1, experts_Nk, d_chosen)
        if ctx.scoring == "sigmoid":
            return d_s * scores_NE * (1 - scores_NE), None, None, None, None, None
        d_logits = scores_NE * (d_s - (d_s * scores_NE).sum(-1, keepdim=True))
        return d_logits, None, None, None, None, None


def routing(
    x_ND: Tensor,
    weight_ED: Tensor,
    *,
    k: int,
    scoring: str,
    scaling: float,
    bias_E: Tensor | None = None,
    experts_Nk: Tensor | None = None,
    want_scores: bool = False,
) -> tuple[Tensor, ...]:
    """See ``reference.routing``."""
    if scoring not in NORMS:
        _npu.fallen_back("routing", f"npu_moe_gating_top_k has softmax and sigmoid, but not {scoring}")
    elif experts_Nk is not None and not _npu.takes(OPERATORS[0], "tid2eid"):
        _npu.fallen_back("routing", "npu_moe_gating_top_k takes given experts from torch_npu 2.13 on")
    elif not _npu.outside(
        "routing",
        (
            not 3 <= len(weight_ED) <= 2048,
            f"npu_moe_gating_top_k takes 3 to 2048 experts, not {len(weight_ED)}",
        ),
        (not len(x_ND), "npu_moe_gating_top_k takes no empty tensor"),
    ):
        found = apply(_Gate, apply(_Logits, x_ND, weight_ED), k, scoring, scaling, bias_E, experts_Nk)
        return found if want_scores else found[:2]
    return by_torch(
        x_ND,
        weight_ED,
        k=k,
        scoring=scoring,
        scaling=scaling,
        bias_E=bias_E,
        experts_Nk=experts_Nk,
        want_scores=want_scores,
    )
