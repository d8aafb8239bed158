"""Divergences in chunks of tokens: never ``[N, V]``; each chunk's distributions are made again in the backward pass.

Legend as in ``reference``; n tokens of a chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels._products import add_mm, full_mm, operands
from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype, workspace
from kernels.linear_kl.reference import check

# Numbers of a chunk in one of up to four buffers: those of a CPU stay in cache, those of a device fill it.
CPU_CHUNK, DEVICE_CHUNK = 1 << 19, 1 << 26


class _LinearKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, teacher_NE, teacher_head_VE, kind, beta, chunk):
        full, N = full_dtype(hidden_ND), len(hidden_ND)
        student, teacher = operands(hidden_ND, head_VD), operands(teacher_NE, teacher_head_VE)
        kl_N = torch.empty(N, dtype=full, device=hidden_ND.device)
        # What the gradient subtracts: the mean, under the student, of the log-ratio that it weighs.
        mean_N = torch.empty_like(kl_N)
        for start in range(0, N, chunk):
            part = slice(start, start + chunk)
            q_nV, p_nV = (_log_softmax(slot, *each, part) for slot, each in enumerate((student, teacher), 1))
            kl_N[part], mean_N[part] = _divergence(q_nV, p_nV, kind, beta)
        ctx.save_for_backward(hidden_ND, head_VD, teacher_NE, teacher_head_VE, mean_N)
        ctx.kind, ctx.beta, ctx.chunk = kind, beta, chunk
        return kl_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, head_VD, teacher_NE, teacher_head_VE, mean_N = ctx.saved_tensors
        full, (wants_hidden, wants_head) = full_dtype(hidden_ND), ctx.needs_input_grad[:2]
        student, teacher = operands(hidden_ND, head_VD), operands(teacher_NE, teacher_head_VE)
        d_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        d_head = torch.zeros(head_VD.shape, dtype=full, device=head_VD.device) if wants_head else None
        for start in range(0, len(hidden_ND), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            q_nV, p_nV = (_log_softmax(slot, *each, part) for slot, each in enumerate((student, teacher), 1))
            d_logits = _gradient(q_nV, p_nV, mean_N[part, None], ctx.kind, ctx.beta)
            d_logits.mul_(grad_N[part, None].to(full))
            inputs_ND, head = student
            d_logits = d_logits.to(head.dtype)
            if wants_hidden:
                d_hidden[part] = full_mm(d_logits, head)
            if wants_head:
                d_head = add_mm(d_head, d_logits.T, inputs_ND[part])
        d_head = d_head.to(head_VD.dtype) if wants_head else None
        return d_hidden, d_head, None, None, None, None, None


def _log_softmax(slot: int, states_NX: Tensor, head_VX: Tensor, part: slice) -> Tensor:
    """Log-probabilities of a part of the tokens ``[n, V]`` in this slot of the workspace; slot 0 is free again."""
    full = full_dtype(states_NX)
    like, states_nX = states_NX.new_empty(0, dtype=full), states_NX[part]
    shape = (len(states_nX), len(head_VX))
    logits = full_mm(states_nX, head_VX.T, out=workspace(0, shape, like))
    return torch.log_softmax(logits, -1, out=workspace(slot, shape, like))


def _mixture(q_nV: Tensor, p_nV: Tensor, beta: float) -> Tensor:
    """``log(β·p + (1-β)·q)`` in slot 3; slot 0 is used between."""
    shape = tuple(q_nV.shape)
    m_nV = torch.add(p_nV, math.log(beta), out=workspace(3, shape, q_nV))
    other_nV = torch.add(q_nV, math.log1p(-beta), out=workspace(0, shape, q_nV))
    return torch.logaddexp(m_nV, other_nV, out=m_nV)


def _kl(log_a_nV: Tensor, log_b_nV: Tensor) -> Tensor:
    """KL(a ‖ b); writes the log-ratio over a, and a into slot 0."""
    a_nV = torch.exp(log_a_nV, out=workspace(0, tuple(log_a_nV.shape), log_a_nV))
    return torch.linalg.vecdot(a_nV, log_a_nV.sub_(log_b_nV))


def _divergence(q_nV: Tensor, p_nV: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of each token, and the mean under q that ``_gradient`` wants; writes over both."""
    if kind == "forward":
        kl_n = _kl(p_nV, q_nV)
        return kl_n, torch.zeros_like(kl_n)
    if kind == "reverse":
        kl_n = _kl(q_nV, p_nV)
        return kl_n, kl_n
    m_nV = _mixture(q_nV, p_nV, beta)
    of_teacher_n, of_student_n = _kl(p_nV, m_nV), _kl(q_nV, m_nV)
    return beta * of_teacher_n + (1 - beta) * of_student_n, of_student_n


def _gradient(q_nV: Tensor, p_nV: Tensor, mean_n1: Tensor, kind: str, beta: float) -> Tensor:
    """Gradient of the divergence in the student's logits, in slot 0; writes over q and p.

    forward q - p; reverse q·(log q/p - KL(q ‖ p)); js (1-β)·q·(log q/m - KL(q ‖ m)): what the mixture's own change
    adds sums to one over both terms and falls out.
    """
    scratch = workspace(0, tuple(q_nV.shape), q_nV)
    if kind == "forward":
        return torch.exp(q_nV, out=scratch).sub_(p_nV.exp_())
    other_nV, share = (p_nV, 1.0) if kind == "reverse" else (_mixture(q_nV, p_nV, beta), 1 - beta)
    out = torch.exp(q_nV, out=scratch)
    return out.mul_(q_nV.sub_(other_nV).sub_(mean_n1).mul_(share))


def linear_kl(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    *,
    kind: str = "reverse",
    beta: float = 0.5,
    chunk: int | None = None,
) -> Tensor:
    """See ``reference.linear_kl``; ``chunk`` tokens at once, by default as many as the device has use for."""
    check(student_head_VD, teacher_head_VE, kind, beta)
    held = CPU_CHUNK if student_hidden_ND.device.type == "cpu" else DEVICE_CHUNK
    chunk = chunk or max(16, held // len(student_head_VD))
    teacher = teacher_hidden_NE.detach(), teacher_head_VE.detach()
    return _LinearKl.apply(student_hidden_ND, student_head_VD, *teacher, kind, beta, chunk)
