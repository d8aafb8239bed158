"""Small modules shared by the blocks: norm, linear, and the context that every layer of a forward pass reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels import registry
from kernels.geometry import Geometry
from lab_utils.models.deepseek_v4.rotary import Rotary


@dataclass
class Context:
    """One forward pass over packed rows: where documents lie, and RoPE's angles (made once, read by all layers)."""

    input_ids: Tensor
    geometry: Geometry
    rotary: Rotary
    indexer_loss: bool  # whether the indexer's KL is wanted
    _angles: dict = field(default_factory=dict)

    def angles(self, kind: str, rate: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens ``[B, T, R]``, or of the entries at a compression rate ``[B, C, R]``."""
        if (kind, rate) not in self._angles:
            positions = (
                self.geometry.position_BT if rate is None else self.geometry.entries(rate).positions_BC
            )
            self._angles[kind, rate] = self.rotary(kind, positions)
        return self._angles[kind, rate]


def operator(name: str, x: Tensor):
    """The kernel of this name for the device and dtype of x."""
    return registry.get(name, x.device.type, x.dtype)


class Norm(nn.Module):
    """RMSNorm with a weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return operator("rms_norm", x)(x, self.weight, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias, its memory not yet initialised (``initialize`` does that by seed)."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
