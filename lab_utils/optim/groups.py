"""Which parameters get weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer, each ``{"params", "names", "weight_decay"}``; a group without members is left out.

    Weight decay is for matrices (two dimensions or more, stacked experts included): pulling a norm's gain, a bias, a
    sink or a scale towards zero changes what the layer is, not how large its weights are. Order is the model's own, so
    that every rank and every restart sees the same groups. A parameter shared by two modules appears once.
    """
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else plain)[name] = parameter
    groups = ((decayed, weight_decay), (plain, 0.0))
    return [{"params": [*g.values()], "names": [*g], "weight_decay": decay} for g, decay in groups if g]
