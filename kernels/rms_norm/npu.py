"""RMSNorm by ``npu_rms_norm`` (A2, A3, 950), whose gradient torch_npu has.

Formula and dtypes: op-plugin's document of ``npu_rms_norm``. The weight has x's dtype or is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu

OPERATORS = ("npu::npu_rms_norm",)
unsupported = _npu.runs(OPERATORS, products=("A2", "A3", "950"))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``."""
    if weight.dtype not in (x.dtype, torch.float32):
        weight = weight.to(x.dtype)
    rows = x if x.dim() > 1 else x[None]  # it takes 2 to 8 dimensions
    return _npu.call(OPERATORS[0], rows, weight, eps)[0].view(x.shape)
