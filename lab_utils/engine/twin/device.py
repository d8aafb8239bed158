"""The device that a twin runs on: the CPU as it is, or an NPU that is not there.

On device ``npu`` the model takes the way that it takes on a chip (bf16 products, memory given back at once). Where
torch_npu has been imported, that is its device. Elsewhere a stand-in takes the name: a device without a driver, known
to torch by its Python interface for new backends. It holds no byte and computes nothing; fake tensors need no more.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch

from lab_utils.accelerators import Accelerator, Memory, Peak
from lab_utils.engine.cpu import CompleteCpu

BACKENDS = {"cpu": "gloo", "npu": "hccl"}


class Nowhere(Accelerator):
    """The device kind of a twin, as the engine asks for it."""

    def __init__(self, name: str) -> None:
        self.name, self.backend = name, BACKENDS[name]

    @classmethod
    def available(cls) -> bool:
        return True

    def setup(self, local_rank: int = 0, threads: int | None = None, local_world: int = 1) -> torch.device:
        if self.name == "npu":
            register_npu()
            return torch.device("npu", 0)
        return torch.device("cpu")

    def device_name(self) -> str:
        return f"{self.name}, which is not there"

    def peak(self, dtype: str) -> Peak:
        return Peak(None, "a twin takes no time")

    def memory(self) -> Memory:
        return Memory(0, 0, None)

    def reset_memory_peak(self) -> None: ...

    def synchronize(self) -> None: ...

    def seed(self, value: int) -> None: ...

    def rng_state(self) -> dict[str, Any]:
        return {}

    def set_rng_state(self, state: dict[str, Any]) -> None: ...


class Idle(CompleteCpu):
    """What ColossalAI asks of its accelerator, answered for a device without a driver."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def current_device(self) -> torch.device:
        return self._device

    def get_current_device(self) -> torch.device:
        return self._device


@cache
def register_npu() -> None:
    """Give the name ``npu`` to a device, unless torch_npu has done so."""
    if "torch_npu" in sys.modules:
        return
    from torch._C import _acc
    from torch.utils import backend_registration

    class Guard(_acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    class Module(backend_registration._DummyBackendModule):
        """What checkpointing and autocast ask of a device's module."""

        _initialized = False  # it has no generator whose state would be kept

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(
        "npu", backend_module=Module(), device_guard=Guard()
    )
