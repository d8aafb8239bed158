"""CUDA: NVML through pynvml. Inert where there is no NVIDIA driver."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from lab_utils.accelerators._hidden import setting
from lab_utils.telemetry.chips import ChipReading

MIB = 2**20


def visible(total: int, value: str | None) -> list[int | str]:
    """Devices that CUDA_VISIBLE_DEVICES leaves, as indices or UUIDs, in the order in which CUDA counts them.

    As in CUDA, the list ends at the first entry that names no device.
    """
    if value is None:
        return list(range(total))
    chosen: list[int | str] = []
    for entry in (part.strip() for part in value.split(",")):
        if entry.isdigit() and int(entry) < total:
            chosen.append(int(entry))
        elif entry.startswith(("GPU-", "MIG-")):
            chosen.append(entry)
        else:
            break
    return chosen


def count() -> int:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return len(visible(pynvml.nvmlDeviceGetCount(), setting("CUDA_VISIBLE_DEVICES")))
    finally:
        pynvml.nvmlShutdown()


class CudaProbe:
    """Args:
    nvml: the pynvml module, initialised.
    chips: how many of the visible devices the run uses; None = all.
    """

    min_interval = 1.0

    def __init__(self, nvml: Any, chips: int | None):
        self.nvml = nvml
        devices = visible(nvml.nvmlDeviceGetCount(), os.environ.get("CUDA_VISIBLE_DEVICES"))[:chips]
        self.handles = [
            nvml.nvmlDeviceGetHandleByIndex(d) if isinstance(d, int) else nvml.nvmlDeviceGetHandleByUUID(d)
            for d in devices
        ]

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None where this board or driver does not know it."""
        with contextlib.suppress(self.nvml.NVMLError):
            return question(*arguments)
        return None

    def read(self) -> list[ChipReading]:
        nvml, readings = self.nvml, []
        for index, handle in enumerate(self.handles):
            rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
            memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
            milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
            name = self._ask(nvml.nvmlDeviceGetName, handle) or ""
            readings.append(
                ChipReading(
                    index=index,
                    name=name.decode() if isinstance(name, bytes) else name,
                    util=None if rates is None else float(rates.gpu),
                    used_mib=None if memory is None else memory.used / MIB,
                    total_mib=None if memory is None else memory.total / MIB,
                    power=None if milliwatts is None else milliwatts / 1000,
                    temp=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                    more={"health": self._health(handle)},
                )
            )
        return readings

    def _health(self, handle: Any) -> str | None:
        """Of the board's memory, the one part that NVML judges; None on boards without error correction."""
        nvml = self.nvml
        remapped = self._ask(
            nvml.nvmlDeviceGetRemappedRows, handle
        )  # corrected, uncorrected, pending, failed
        kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        errors = self._ask(nvml.nvmlDeviceGetTotalEccErrors, handle, kind, since)
        if remapped is None and errors is None:
            return None
        if remapped and remapped[3]:
            return "Row remapping failed"
        if errors:
            return "Uncorrected memory errors"
        return "Reset needed" if remapped and remapped[2] else "OK"


def make(chips: int | None) -> CudaProbe:
    import pynvml

    pynvml.nvmlInit()
    return CudaProbe(pynvml, chips)
