"""Divergence of a student's next-token distribution from a teacher's over the whole vocabulary, in fp32.

Both come as last hidden states and head weights, ``softmax(hidden · headᵀ)``. Legend: N tokens, D and E widths of
student and teacher, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype

KINDS = ("reverse", "forward", "js")


def check(student_head_VD: Tensor, teacher_head_VE: Tensor, kind: str, beta: float) -> None:
    """Raises ValueError: an unknown kind, vocabularies of two sizes, or a ``beta`` that is not between 0 and 1."""
    if kind not in KINDS:
        raise ValueError(f"linear_kl: kind '{kind}' is unknown; choose one of {', '.join(KINDS)}.")
    if len(student_head_VD) != len(teacher_head_VE):
        raise ValueError(
            f"linear_kl: the student's vocabulary has {len(student_head_VD)} tokens, the teacher's "
            f"{len(teacher_head_VE)}; they must be the same tokens."
        )
    if kind == "js" and not 0 < beta < 1:
        raise ValueError(f"linear_kl: beta={beta} must lie between 0 and 1; its ends are kinds of their own.")


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
    """The divergence of each token in nats, ``[N]`` fp32; no gradient goes to the teacher.

    With student q and teacher p: "reverse" is KL(q ‖ p), "forward" KL(p ‖ q), and "js" the generalised Jensen-Shannon
    divergence β·KL(p ‖ m) + (1-β)·KL(q ‖ m) with m = β·p + (1-β)·q (GKD, arXiv 2306.13649, eq. 1).

    Args:
        beta: weight of the teacher in the mixture of "js", within (0, 1).
        chunk: tokens worked on at once, for implementations that work in chunks; the definition takes all of them.

    Raises:
        ValueError: see ``check``.
    """
    check(student_head_VD, teacher_head_VE, kind, beta)
    full = full_dtype(student_hidden_ND)
    q_NV = (student_hidden_ND.to(full) @ student_head_VD.to(full).T).log_softmax(-1)
    p_NV = (teacher_hidden_NE.detach().to(full) @ teacher_head_VE.detach().to(full).T).log_softmax(-1)
    if kind == "reverse":
        return _kl(q_NV, p_NV)
    if kind == "forward":
        return _kl(p_NV, q_NV)
    m_NV = torch.logaddexp(p_NV + math.log(beta), q_NV + math.log1p(-beta))
    return beta * _kl(p_NV, m_NV) + (1 - beta) * _kl(q_NV, m_NV)


def _kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """KL(a ‖ b)."""
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)
