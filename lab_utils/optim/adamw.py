"""AdamW (Loshchilov and Hutter, 2019) with torch's own kernels, on whole parameters or on ZeRO's flat slices."""

from __future__ import annotations

from typing import Any

import torch

from lab_utils.recipe import OptimSection


def build(groups: list[dict[str, Any]], section: OptimSection) -> torch.optim.Optimizer:
    """The optimizer of ``optim.kind: adamw`` over groups from ``parameter_groups``.

    The fused kernel reads and writes each parameter and moment once; it exists for cpu, cuda and npu tensors alike, and
    ``tests/optim`` compares it with the plain formula.
    """
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
