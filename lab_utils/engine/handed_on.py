"""Stages let go of the streams that they have handed on.

ColossalAI's schedules hold what a stage has sent until its backward pass, only to start that pass from it: of the
tensor autograd needs the place in the graph, not the numbers. With many virtual stages that is as much memory as their
layers keep under ``full`` checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

SENDS = ("send_forward", "send_forward_recv_backward", "send_forward_recv_forward")


def let_go(schedule: Any) -> None:
    """Make a schedule give up the memory of its outputs as soon as they are sent.

    Its sends must have ended when they return (``overlap_p2p`` off).
    """
    for name in SENDS:
        if (send := getattr(schedule, name, None)) is not None:
            setattr(schedule, name, _then_empty(send))


def _then_empty(send: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(send)
    def sent(*args: Any, **options: Any) -> Any:
        found = send(*args, **options)
        output = options["output_tensor"] if "output_tensor" in options else args[-1]
        if isinstance(output, dict):  # the last stage's is a loss, which goes nowhere
            for tensor in output.values():
                empty(tensor)
        return found

    return sent


def empty(tensor: torch.Tensor) -> None:
    """Leave a tensor its shape and its place in the graph, and of its memory one element."""
    tensor.data = tensor.new_empty(()).expand(tensor.shape)
