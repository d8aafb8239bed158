"""Log-probability of given tokens under ``softmax(hidden · headᵀ)``, in fp32.

Legend: N tokens, D model, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype


def linear_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logprob [N] fp32, correct [N] bool, entropy [N] fp32 detached)``.

    ``correct`` says whether the target has the largest logit; ``chunk``, tokens worked on at once, is for
    implementations that work in chunks: the definition takes all of them.
    """
    full = full_dtype(hidden_ND)
    logits_NV = hidden_ND.to(full) @ weight_VD.to(full).T
    log_p_NV = logits_NV.log_softmax(-1)
    logprob_N = log_p_NV.gather(1, targets_N[:, None]).squeeze(1)
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1).detach()
    return logprob_N, logits_NV.detach().argmax(-1) == targets_N, entropy_N
