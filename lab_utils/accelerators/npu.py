"""Ascend NPUs: 910B (A2) and 910C (A3, where each of a package's two dies is a device and a rank)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lab_utils.accelerators import ModuleAccelerator, Peak

# BF16 TFLOP/s of one device by the start of its SoC name. 910C: arXiv 2506.12708, 752 a package of two dies.
# 910B variants differ in clock and cores; B1/B2 are given with the rate of the same die, B3/B4 are not published.
BF16_TFLOPS: dict[str, float] = {"Ascend910_93": 376.0, "Ascend910B1": 376.0, "Ascend910B2": 376.0}


class Npu(ModuleAccelerator):
    name = "npu"
    backend = "hccl"

    @classmethod
    def available(cls) -> bool:
        """The extension is installed and the driver shows a device; neither is opened."""
        return importlib.util.find_spec("torch_npu") is not None and any(Path("/dev").glob("davinci[0-9]*"))

    def module(self) -> Any:
        import torch
        import torch_npu  # noqa: F401  (registers torch.npu and the hccl backend)

        return torch.npu

    def peak(self, dtype: str) -> Peak:
        return soc_peak(self.device_name(), dtype)


def soc_peak(soc_name: str, dtype: str) -> Peak:
    """Peak of one device by its SoC name. float32 products have no published rate."""
    for start, tflops in BF16_TFLOPS.items():
        if dtype == "bfloat16" and soc_name.startswith(start):
            return Peak(tflops * 1e12, f"published BF16 rate of {start}*, one device")
    return Peak(None, f"no published rate for '{soc_name}' in {dtype}")


ACCELERATOR = Npu
