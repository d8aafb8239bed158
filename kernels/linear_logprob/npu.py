"""Token log-probabilities in chunks, with ``npu_cross_entropy_loss`` and its gradient in place of four passes over
logits.

The operator gives the loss and all log-probabilities of a chunk; largest logit and entropy are read off those. Logits
are made again in the backward pass, as in ``torch.py``. Vocabulary in one piece; the operators that take part of it
(``npu_fused_linear_online_max_sum``) have neither meta function nor gradient in torch_npu. Limits (op-plugin's
document): at most 200,000 tokens at once, targets in int64, reduction "none". Legend as in ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu
from kernels._products import add_mm, full_mm, operands
from kernels._support import full_dtype
from kernels.linear_logprob.torch import DEVICE_CHUNK

OPERATORS = ("npu::npu_cross_entropy_loss", "npu::npu_cross_entropy_loss_backward")
LOSS, GRADIENT = OPERATORS
unsupported = _npu.runs(OPERATORS, products=("A2", "A3", "950"))
MOST = 200_000


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, chunk):
        full = full_dtype(hidden_ND)
        inputs_ND, head_VD = operands(hidden_ND, weight_VD)
        logprob = torch.empty(len(targets_N), dtype=full, device=hidden_ND.device)
        log_z, entropy = torch.empty_like(logprob), torch.empty_like(logprob)
        correct = torch.empty(len(targets_N), dtype=torch.bool, device=hidden_ND.device)
        for start in range(0, len(targets_N), chunk):
            part, targets_n = slice(start, start + chunk), targets_N[start : start + chunk]
            logits_nV = full_mm(inputs_ND[part], head_VD.T)
            loss_n, log_p_nV, _, _ = _npu.call(LOSS, logits_nV, targets_n, reduction="none")
            logprob[part] = -loss_n
            log_z[part] = logits_nV.gather(1, targets_n[:, None]).squeeze(1) + loss_n
            correct[part] = log_p_nV.argmax(-1) == targets_n
            entropy[part] = -(log_p_nV.exp().mul_(log_p_nV)).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, log_z)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(correct, entropy)
        return logprob, correct, entropy

    @staticmethod
    def backward(ctx, grad_N, _correct, _entropy):
        hidden_ND, weight_VD, targets_N, log_z = ctx.saved_tensors
        full = full_dtype(hidden_ND)
        inputs_ND, head_VD = operands(hidden_ND, weight_VD)
        d_hidden = torch.empty_like(hidden_ND)
        d_weight = torch.zeros(weight_VD.shape, dtype=full, device=weight_VD.device)
        for start in range(0, len(targets_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            hidden_nD = inputs_ND[part]
            log_p_nV = full_mm(hidden_nD, head_VD.T).sub_(log_z[part, None])
            # The log-probability is the loss with the other sign.
            d_logits_nV = _npu.call(
                GRADIENT, -grad_N[part].to(full), log_p_nV, targets_N[part], reduction="none"
            )
            d_logits_nV = d_logits_nV.to(head_VD.dtype)
            d_hidden[part] = full_mm(d_logits_nV, head_VD).to(d_hidden.dtype)
            d_weight = add_mm(d_weight, d_logits_nV.T, hidden_nD)
        return d_hidden, d_weight.to(weight_VD.dtype), None, None


def linear_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.linear_logprob``; ``chunk`` tokens at once, by default as many as the device has use for."""
    chunk = min(MOST, chunk or max(16, DEVICE_CHUNK // len(weight_VD)))
    return _LinearLogprob.apply(hidden_ND, weight_VD, targets_N, chunk)
