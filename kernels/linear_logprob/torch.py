"""Token log-probabilities in chunks: never ``[N, V]``; each chunk's logits are made again in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._products import add_mm, full_mm, operands
from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype, workspace

# Logits held at once: 2 MiB stay in a core's cache. On a device 1 GiB: the head's gradient, of V4-Pro 3.5 GiB in fp32,
# passes through memory once a chunk.
CPU_CHUNK, DEVICE_CHUNK = 1 << 19, 1 << 28


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, chunk):
        full = full_dtype(hidden_ND)
        inputs_ND, head_VD = operands(hidden_ND, weight_VD)
        logprob = torch.empty(len(targets_N), dtype=full, device=hidden_ND.device)
        log_z, entropy = torch.empty_like(logprob), torch.empty_like(logprob)
        correct = torch.empty(len(targets_N), dtype=torch.bool, device=hidden_ND.device)
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            shape = (len(targets_N[part]), len(weight_VD))
            logits = full_mm(inputs_ND[part], head_VD.T, out=workspace(0, shape, logprob))
            best, token = logits.max(-1)
            correct[part] = token == targets_N[part]
            target = logits.gather(1, targets_N[part, None]).squeeze(1)
            weight = torch.sub(logits, best[:, None], out=workspace(1, shape, logprob)).exp_()
            total = weight.sum(-1)
            log_z[part] = best + total.log()
            logprob[part] = target - log_z[part]
            # entropy = log Z - Σ p·logit
            entropy[part] = log_z[part] - weight.mul_(logits).sum(-1) / total
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
            hidden, grad = inputs_ND[part], grad_N[part, None].to(full)
            # d logits = grad · (onehot - softmax)
            logits = full_mm(hidden, head_VD.T, out=workspace(0, (len(hidden), len(head_VD)), grad))
            d_logits = logits.sub_(log_z[part, None]).exp_().mul_(-grad)
            d_logits.scatter_add_(1, targets_N[part, None], grad)
            d_logits = d_logits.to(head_VD.dtype)
            d_hidden[part] = full_mm(d_logits, head_VD)
            d_weight = add_mm(d_weight, d_logits.T, hidden)
        return d_hidden, d_weight.to(weight_VD.dtype), None, None


def linear_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.linear_logprob``; ``chunk`` tokens at once, by default as many as the device has use for."""
    held = CPU_CHUNK if hidden_ND.device.type == "cpu" else DEVICE_CHUNK
    return _LinearLogprob.apply(hidden_ND, weight_VD, targets_N, chunk or max(16, held // weight_VD.shape[0]))
