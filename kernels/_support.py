"""Answers shared by ``unsupported`` of the implementations."""

from __future__ import annotations

import threading

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


class _NoBackward:
    """In place of a function's context, where there will be no backward pass."""

    def save_for_backward(self, *tensors) -> None:
        pass

    mark_non_differentiable = save_for_backward


def apply(function: type[torch.autograd.Function], *args):
    """``function.apply``, without its cost where no gradient is wanted: that of decoding a token is mostly such."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(_NoBackward(), *args)


def break_ties(scores: torch.Tensor) -> torch.Tensor:
    """Scores ``[…, L]`` whose exact zeros fall off with their place: of several, the earliest entry ranks first.

    A relu makes index scores that are exactly zero; ``topk`` would choose among them by memory layout, and a packed
    document could select other entries than it does alone.
    """
    place_L = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    return torch.where(scores == 0, place_L * -1e-30, scores)


def count(index_M: torch.Tensor, size: int) -> torch.Tensor:
    """How often each number below ``size`` occurs, ``[size]`` int64.

    ``bincount`` looks for the largest number first, for which the host would wait for a device.
    """
    if index_M.device.type == "cpu":
        return torch.bincount(index_M, minlength=size)
    found = torch.zeros(size, dtype=torch.int64, device=index_M.device)
    return found.scatter_add_(0, index_M.long(), torch.ones_like(index_M, dtype=torch.int64))


_buffers = threading.local()


def workspace(slot: int, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory of this shape that the next caller of the same slot gets again (one call's scratch).

    On CPU large temporaries otherwise come fresh from the system each time, and their page faults cost more than the
    arithmetic on them; one buffer a slot and thread stays, and stays in cache. Other devices' allocators already
    do that. The memory must not outlive the call that took it, nor be saved for the backward pass.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = 1
    for length in shape:
        size *= length
    held = _buffers.__dict__.setdefault((slot, like.dtype), like.new_empty(0))
    if held.numel() < size:
        held = _buffers.__dict__[slot, like.dtype] = like.new_empty(size)
    return held[:size].view(shape)


def gather_rows(slot: int, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x[index]`` in the workspace."""
    return torch.index_select(x, 0, index, out=workspace(slot, (len(index), *x.shape[1:]), x))
