"""Random inputs of routing. Legend: N tokens, D model, E experts, k experts of a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._cases import SMALL, Case, between, normal

VARIANTS = (
    {"scoring": "sqrtsoftplus"},
    {"scoring": "sqrtsoftplus", "given": True},
    {"scoring": "sigmoid"},
    {"scoring": "softmax"},
)


def case(g: torch.Generator, size: str, *, scoring: str = "sqrtsoftplus", given: bool = False) -> Case:
    if size == SMALL:
        N, D, E = between(g, 1, 20), between(g, 1, 24), between(g, 2, 12)
        k = between(g, 1, E)
    else:
        N, D, E, k = 2048, 512, 64, 6
    inputs = {"x_ND": normal(g, N, D), "weight_ED": normal(g, E, D) / D**0.5}
    options = {"k": k, "scoring": scoring, "scaling": 1.5, "want_scores": True}
    if given:
        options["experts_Nk"] = torch.rand(N, E, generator=g).argsort(1)[:, :k]
    else:
        options["bias_E"] = normal(g, E) / 4
    shape = {"N": N, "D": D, "E": E, "k": k}
    return Case(inputs, options, tuple(inputs), view=by_expert, flops=3 * 2 * N * D * E, shape=shape)


def by_expert(outputs: tuple[Tensor, ...], _: dict[str, Any]) -> tuple[Tensor, ...]:
    """Weights and choices at their experts ``[N, E]``: the order of a token's experts is free."""
    experts_Nk, weights_Nk, scores_NE = outputs
    weights_NE = torch.zeros_like(scores_NE).scatter_add(1, experts_Nk, weights_Nk.to(scores_NE.dtype))
    chosen_NE = torch.zeros_like(scores_NE.detach())
    chosen_NE = chosen_NE.scatter_add(1, experts_Nk, torch.ones_like(weights_Nk.detach()).to(chosen_NE.dtype))
    return weights_NE, chosen_NE, scores_NE
