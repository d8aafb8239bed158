"""Linear map without bias, or G of them side by side (block-diagonal).

Legend: I inputs, O outputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``[…, I]`` by ``weight [O, I]`` to ``[…, O]``; ``[…, G·I]`` by ``[G, O, I]`` to ``[…, G·O]``."""
    if weight.ndim == 2:
        return torch.einsum("...i,oi->...o", x, weight)
    return torch.einsum("...gi,goi->...go", x.unflatten(-1, (len(weight), -1)), weight).flatten(-2)
