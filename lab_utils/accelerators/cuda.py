"""NVIDIA GPUs."""

from __future__ import annotations

import os

from lab_utils.accelerators import ModuleAccelerator, Peak

# Dense matrix products, no sparsity, fp32 accumulation: TFLOP/s by a part of the device's name, longest match first.
# Source: NVIDIA's data sheets of each product. float32 is the rate without TF32, which the engine leaves off.
DATA_SHEETS: dict[str, dict[str, float]] = {
    "B200": {"bfloat16": 2250.0, "float32": 75.0},
    "H200": {"bfloat16": 989.4, "float32": 66.9},
    "H100 PCIe": {"bfloat16": 756.0, "float32": 51.2},
    "H100": {"bfloat16": 989.4, "float32": 66.9},
    "H800": {"bfloat16": 989.4, "float32": 66.9},
    "H20": {"bfloat16": 148.0, "float32": 44.0},
    "A100": {"bfloat16": 312.0, "float32": 19.5},
    "A800": {"bfloat16": 312.0, "float32": 19.5},
    "L40S": {"bfloat16": 362.0, "float32": 91.6},
    "RTX 4090": {"bfloat16": 165.2, "float32": 82.6},
}


class Cuda(ModuleAccelerator):
    name = "cuda"
    backend = "nccl"

    @classmethod
    def available(cls) -> bool:
        # Asking the driver's management library instead of the runtime leaves the process free to fork.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        import torch

        return torch.cuda.is_available()

    def peak(self, dtype: str) -> Peak:
        return data_sheet_peak(self.device_name(), dtype)


def data_sheet_peak(device_name: str, dtype: str) -> Peak:
    """Peak of a GPU by its name; unknown names have none, and the MFU of their runs is left out."""
    for part in sorted(DATA_SHEETS, key=len, reverse=True):
        if part in device_name and dtype in DATA_SHEETS[part]:
            return Peak(DATA_SHEETS[part][dtype] * 1e12, f"NVIDIA data sheet, {part}, dense {dtype}")
    return Peak(None, f"no data-sheet rate is known for '{device_name}' in {dtype}")


ACCELERATOR = Cuda
