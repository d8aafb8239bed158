"""Device kinds: one file a kind beside this one, each with a class named in ``ACCELERATOR``.

``get_accelerator("auto")`` takes the best device kind of this machine in the order npu, cuda, cpu; the environment
variable ``ASCENT_ACCELERATOR`` or the recipe forces one. Nothing here imports torch at module level, and looking for a
device neither opens it nor imports its extension: a login node without a device may ask, and a process may fork after.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab_utils.errors import LayoutError
from lab_utils.registry import load, members, nearest

if TYPE_CHECKING:
    import torch

AUTO_ORDER = ("npu", "cuda", "cpu")


@dataclass(frozen=True)
class Peak:
    """Highest rate of dense matrix products: FLOP/s of one device, None where unknown, and where the number is from."""

    flops: float | None
    source: str


@dataclass(frozen=True)
class Memory:
    """Bytes of one device (``cpu``: of this process): peaks since ``reset_memory_peak``; None where unknown."""

    allocated_peak: int
    reserved_peak: int
    capacity: int | None
    alloc_retries: int = 0


class Accelerator(ABC):
    """What the engine asks of a device kind. One process drives one device."""

    name: str
    backend: str  # torch.distributed backend of collectives on this device

    @classmethod
    @abstractmethod
    def available(cls) -> bool:
        """Whether this machine has such a device; opens none."""

    @abstractmethod
    def setup(self, local_rank: int = 0, threads: int | None = None, local_world: int = 1) -> torch.device:
        """Bind this process to its device, set its CPU threads, and return the device."""

    @abstractmethod
    def device_name(self) -> str:
        """The device's own name, for provenance and the table of peaks."""

    @abstractmethod
    def peak(self, dtype: str) -> Peak:
        """Peak of matrix products in ``dtype`` ("float32" or "bfloat16") on one device."""

    @abstractmethod
    def memory(self) -> Memory: ...

    @abstractmethod
    def reset_memory_peak(self) -> None: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all queued work of this process's device."""

    def seed(self, value: int) -> None:
        """Seed Python's, NumPy's and torch's generators, the device's included."""
        import random

        import numpy
        import torch

        random.seed(value)
        numpy.random.seed(value % 2**32)
        torch.manual_seed(value)  # seeds every device's generator too

    def rng_state(self) -> dict[str, Any]:
        """States of all generators of this process, as JSON-ready values."""
        import random

        import numpy
        import torch

        version, words, gauss = random.getstate()
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        state = {
            "python": [version, list(words), gauss],
            "numpy": [kind, keys.tolist(), position, has_gauss, cached],
            "torch": bytes(torch.get_rng_state().tolist()).hex(),
        }
        if (device := self._device_rng()) is not None:
            state["device"] = bytes(device.cpu().tolist()).hex()
        return state

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Put back what ``rng_state`` returned."""
        import random

        import numpy
        import torch

        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
        torch.set_rng_state(_bytes(state["torch"]))
        if "device" in state:
            self._set_device_rng(_bytes(state["device"]))

    def _device_rng(self) -> torch.Tensor | None:
        return None

    def _set_device_rng(self, state: torch.Tensor) -> None:
        raise NotImplementedError(f"{self.name} has no generator of its own")


class ModuleAccelerator(Accelerator):
    """A device kind that torch drives through a module shaped like ``torch.cuda``."""

    def module(self) -> Any:
        """``torch.<name>``, its extension imported."""
        import torch

        return getattr(torch, self.name)

    def setup(self, local_rank: int = 0, threads: int | None = None, local_world: int = 1) -> torch.device:
        import torch

        found = self.module().device_count()
        if local_rank >= found:
            raise LayoutError(
                f"Local rank {local_rank} has no {self.name} device: this machine shows {found}; "
                f"set cluster.nproc to at most {found}."
            )
        if threads:
            torch.set_num_threads(threads)
        device = torch.device(self.name, local_rank)
        self.module().set_device(device)
        return device

    def device_name(self) -> str:
        return self.module().get_device_name()

    def memory(self) -> Memory:
        module = self.module()
        stats = module.memory_stats()
        return Memory(
            allocated_peak=module.max_memory_allocated(),
            reserved_peak=module.max_memory_reserved(),
            capacity=module.mem_get_info()[1],
            alloc_retries=stats.get("num_alloc_retries", 0),
        )

    def reset_memory_peak(self) -> None:
        self.module().reset_peak_memory_stats()

    def synchronize(self) -> None:
        self.module().synchronize()

    def _device_rng(self) -> torch.Tensor:
        return self.module().get_rng_state()

    def _set_device_rng(self, state: torch.Tensor) -> None:
        self.module().set_rng_state(state)


def accelerator_class(name: str) -> type[Accelerator]:
    """The class of a device kind by the name of its file."""
    try:
        return load(__name__, name).ACCELERATOR
    except KeyError:
        known = ["auto", *members(__name__)]
        raise LayoutError(f"There is no accelerator '{name}': {nearest(name, known)}") from None


def get_accelerator(name: str = "auto") -> Accelerator:
    """The accelerator of this process.

    ``ASCENT_ACCELERATOR`` in the environment wins over ``name``, so that one machine's quirk needs no new recipe.

    Raises:
        LayoutError: no such kind, or this machine has none of it.
    """
    forced = os.environ.get("ASCENT_ACCELERATOR")
    wanted, origin = (forced, "ASCENT_ACCELERATOR") if forced else (name, "cluster.accelerator")
    if wanted == "auto":
        order = [*AUTO_ORDER, *(m for m in members(__name__) if m not in AUTO_ORDER)]
        return next(kind for kind in map(accelerator_class, order) if kind.available())()
    kind = accelerator_class(wanted)
    if not kind.available():
        raise LayoutError(
            f"{origin} is '{wanted}', but this machine has no {wanted} device: run it where there is one, "
            f"or set {origin}=auto."
        )
    return kind()


def _bytes(text: str) -> torch.Tensor:
    import torch

    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
