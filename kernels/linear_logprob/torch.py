"""Token log-probabilities in chunks: never ``[N, V]``; each chunk's logits are made again in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype

CHUNK_ELEMENTS = 1 << 21  # logits held at once


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, chunk):
        full = full_dtype(hidden_ND)
        head_DV = weight_VD.to(full).T
        logprob = torch.empty(len(targets_N), dtype=full, device=hidden_ND.device)
        log_z, entropy = torch.empty_like(logprob), torch.empty_like(logprob)
        correct = torch.empty(len(targets_N), dtype=torch.bool, device=hidden_ND.device)
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            logits = hidden_ND[part].to(full) @ head_DV
            target = logits.gather(1, targets_N[part, None]).squeeze(1)
            correct[part] = logits.argmax(-1) == targets_N[part]
            log_z[part] = logits.logsumexp(-1)
            logprob[part] = target - log_z[part]
            # entropy = log Z - Σ p·logit
            p = logits.softmax(-1)
            entropy[part] = log_z[part] - torch.linalg.vecdot(p, logits)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, log_z)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(correct, entropy)
        return logprob, correct, entropy

    @staticmethod
    def backward(ctx, grad_N, _correct, _entropy):
        hidden_ND, weight_VD, targets_N, log_z = ctx.saved_tensors
        full = full_dtype(hidden_ND)
        head_VD = weight_VD.to(full)
        d_hidden = torch.empty_like(hidden_ND)
        d_weight = torch.zeros(weight_VD.shape, dtype=full, device=weight_VD.device)
        for start in range(0, len(targets_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            hidden, grad = hidden_ND[part].to(full), grad_N[part, None].to(full)
            # d logits = grad · (onehot - softmax)
            d_logits = torch.addmm(-log_z[part, None], hidden, head_VD.T).exp_().mul_(-grad)
            d_logits.scatter_add_(1, targets_N[part, None], grad)
            d_hidden[part] = d_logits @ head_VD
            d_weight.addmm_(d_logits.T, hidden)
        return d_hidden, d_weight.to(weight_VD.dtype), None, None


def linear_logprob(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.linear_logprob``; ``chunk`` tokens at once, by default as many as keep the logits at 8 MiB."""
    chunk = chunk or max(16, CHUNK_ELEMENTS // weight_VD.shape[0])
    return _LinearLogprob.apply(hidden_ND, weight_VD, targets_N, chunk)
