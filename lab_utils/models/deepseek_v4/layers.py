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
    from lab_utils.models.context_parallel import ContextParallel
    from lab_utils.models.deepseek_v4.cache import Caching


@dataclass
class Context:
    """One forward pass over packed rows: where documents lie, and RoPE's angles (made once, read by all layers).

    Under context parallelism ``input_ids`` and ``geometry`` are this rank's run of the rows.
    """

    input_ids: Tensor
    geometry: Geometry
    rotary: Rotary
    indexer_loss: bool  # whether the indexer's KL is wanted
    dense: bool = False  # every visible entry is attended: nothing is selected
    balance: bool = False  # whether the sequence balance loss is wanted
    caching: Caching | None = None  # texts that will be gone on with
    parts: ContextParallel | None = None  # who has the rows' other tokens
    whole_ids: Tensor | None = None  # of the whole rows, where there are parts
    tail: int = 0  # so many tokens at a document's end don't count: in an MTP block they have no next token
    _angles: dict = field(default_factory=dict)

    def angles(self, kind: str, rate: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens ``[B, T, R]``, or of the entries pooled at a compression rate ``[B, C, R]``."""
        if (kind, rate) not in self._angles:
            geometry = self.geometry
            positions = geometry.position_BT if rate is None else geometry.windows(rate).positions_BC
            self._angles[kind, rate] = self.rotary(kind, positions)
        return self._angles[kind, rate]

    def key_angles(self, kind: str) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens that are keys ``[B, X, R]``."""
        if self.parts is None:
            return self.angles(kind)
        if (kind, "keys") not in self._angles:
            self._angles[kind, "keys"] = self.rotary(kind, self.geometry.key_position_BX)
        return self._angles[kind, "keys"]

    # What other ranks have of the rows; without context parallelism everything is here.

    def with_before(self, x_BTD: Tensor) -> Tensor:
        """The tokens that are keys ``[B, X, D]``: those before a run of the rows, and its own."""
        return x_BTD if self.parts is None else self.parts.with_before(x_BTD, self.geometry.before)

    def of_row(self, entries_BcK: Tensor, rate: int) -> Tensor:
        """The compressed entries of the whole row ``[B, C, K]`` from those pooled here."""
        if self.parts is None or not entries_BcK.shape[1]:
            return entries_BcK
        return self.parts.of_row(
            entries_BcK, self.geometry.windows(rate).order, self.geometry.entries(rate).count
        )

    def ahead(self, x_BT: Tensor, tokens: int) -> Tensor:
        """What stands so many places on in a tensor of the whole rows, at this rank's tokens."""
        moved_BT = x_BT.roll(-tokens, 1)
        return moved_BT if self.parts is None else self.parts.cut(moved_BT)

    def ids_ahead(self, tokens: int) -> Tensor:
        return self.ahead(self.input_ids if self.whole_ids is None else self.whole_ids, tokens)

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
