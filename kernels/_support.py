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
