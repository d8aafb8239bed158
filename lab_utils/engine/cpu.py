"""A CPU as ColossalAI should see it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from lab_utils.engine.library import CpuAccelerator


class IdleStream:
    """A CPU has one queue: waiting for it is done before it is asked."""

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


class CompleteCpu(CpuAccelerator):
    """Defect: ``accelerator/cpu_accelerator.py`` raises where ZeRO and the plugins ask (streams, device, memory)."""

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def Stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> IdleStream:
        return IdleStream()

    def Event(self, *args: Any, **kwargs: Any) -> IdleStream:
        return IdleStream()

    def current_stream(self, device: Any = None) -> IdleStream:
        return IdleStream()

    def default_stream(self, device: Any = None) -> IdleStream:
        return IdleStream()

    def stream(self, stream_: Any) -> nullcontext:
        return nullcontext()

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    def max_memory_allocated(self, device: Any = None) -> int:
        return 0

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """Defect: hands its device on to a torch function that takes no argument."""
        return torch.get_rng_state()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)
