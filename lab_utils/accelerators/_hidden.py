"""Devices that the login node's kernel hides from itself are there again for what it launches.

``kernels/jupyter/kernel.json`` sets the variables below to nothing, and ASCENT_KERNEL to say that it did; whatever is
started from a notebook inherits them.
"""

from __future__ import annotations

import os

MARK = "ASCENT_KERNEL"
HIDDEN = ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def setting(name: str) -> str | None:
    """A variable of HIDDEN as it is for what computes; empty where somebody else has emptied it."""
    value = os.environ.get(name)
    return None if value == "" and MARK in os.environ else value


def show_devices() -> None:
    """Undo what the kernel did, in a process that computes, before it imports torch."""
    for name in HIDDEN:
        if setting(name) is None:
            os.environ.pop(name, None)
    os.environ.pop(MARK, None)
