"""Expert routing (TR §2.1): scores in fp32, learned top-k with a selection bias, or a given table.

Legend: N tokens, D model, E experts, k experts of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype

SCORES = {
    # The floor keeps the root's gradient finite where softplus underflows; no score that matters is below 1e-15.
    "sqrtsoftplus": lambda logits: F.softplus(logits).clamp(min=1e-30).sqrt(),
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
}


def choose(
    scores_NE: Tensor, k: int, scaling: float, bias_E: Tensor | None, experts_Nk: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Experts and weights from the scores: the given experts, or the top-k of score + bias."""
    if experts_Nk is None:
        experts_Nk = (scores_NE.detach() + bias_E).topk(k, -1, sorted=False).indices
    weights_Nk = scores_NE.gather(1, experts_Nk)
    return experts_Nk, weights_Nk / (weights_Nk.sum(-1, keepdim=True) + 1e-20) * scaling


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
    """Experts of each token ``[N, k]`` and their weights ``[N, k]`` (fp32, summing to ``scaling``).

    The chosen ones are ``experts_Nk`` (hash layers, replayed routing) or the top-k of score + bias; the bias never
    enters a weight. With ``want_scores`` the scores of all experts ``[N, E]`` (fp32, with their gradient) come third.
    """
    full = full_dtype(x_ND)
    scores_NE = SCORES[scoring](x_ND.to(full) @ weight_ED.to(full).T)
    found = choose(scores_NE, k, scaling, bias_E, experts_Nk)
    return (*found, scores_NE) if want_scores else found
