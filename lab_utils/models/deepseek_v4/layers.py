"""Small modules shared by the blocks: norm, linear, and the context that every layer of a forward pass reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels import registry
from kernels.geometry import Geometry
from lab_utils.models.deepseek_v4.rotary import Rotary

if TYPE_CHECKING:
    from lab_utils.models.deepseek_v4.cache import Caching


@dataclass
class Context:
    """One forward pass over packed rows: where documents lie, and RoPE's angles (made once, read by all layers)."""

    input_ids: Tensor
    geometry: Geometry
    rotary: Rotary
    indexer_loss: bool  # whether the indexer's KL is wanted
    dense: bool = False  # every visible entry is attended: nothing is selected
    balance: bool = False  # whether the sequence balance loss is wanted
    caching: Caching | None = None  # texts that will be gone on with
    tail: int = 0  # so many tokens at a document's end don't count: in an MTP block they have no next token
    _angles: dict = field(default_factory=dict)

    def angles(self, kind: str, rate: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens ``[B, T, R]``, or of the entries at a compression rate ``[B, C, R]``."""
        if (kind, rate) not in self._angles:
            positions = (
                self.geometry.position_BT if rate is None else self.geometry.entries(rate).positions_BC
            )
            self._angles[kind, rate] = self.rotary(kind, positions)
        return self._angles[kind, rate]

    @cached_property
    def counted_BT(self) -> Tensor:
        """Tokens that count in the experts' load: no padding, and none of a document's ``tail``."""
        geometry = self.geometry
        return geometry.real_BT & (geometry.local_BT < geometry.length_BT - self.tail)


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


def uninitialised(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A module on torch's default device with its memory as it comes (``initialize`` fills it by seed)."""
    return nn.utils.skip_init(kind, *args, device=torch.get_default_device(), **kwargs)


class Linear(nn.Linear):
    """A linear map without bias by the kernel of that name."""

    def forward(self, x: Tensor) -> Tensor:
        return operator("linear", x)(x, self.weight)


def linear(inputs: int, outputs: int) -> Linear:
    """A linear map without bias, uninitialised."""
    return uninitialised(Linear, inputs, outputs, bias=False)
