"""Answers shared by ``unsupported`` of the implementations."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def any_device(device_type: str, dtype: torch.dtype) -> str | None:
    """For implementations in plain torch operators: every device, floating dtypes."""
    return None if dtype in FLOATS else f"{dtype} is not a floating dtype"


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of matrix products on x: fp32 on CPU, where bf16 products without AMX are the slower ones."""
    if x.dtype == torch.float64 or x.device.type != "cpu":
        return x.dtype
    return torch.float32


def full_dtype(x: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where the input already is (gradient checks)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def break_ties(scores: torch.Tensor) -> torch.Tensor:
    """Scores ``[…, L]`` whose exact zeros fall off with their place: of several, the earliest entry ranks first.

    A relu makes index scores that are exactly zero; ``topk`` would choose among them by memory layout, and a packed
    document could select other entries than it does alone.
    """
    place_L = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    return torch.where(scores == 0, place_L * -1e-30, scores)
