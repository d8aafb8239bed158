"""Packed rows: the one shape in which data meets a model. ``B`` rows, ``T`` tokens, ``D`` documents a row."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

OWN = ("input_ids", "position_ids", "document_ids", "loss_weights")


@dataclass(frozen=True)
class PackedRows:
    """Rows of whole documents, one behind the other, padding at the end.

    Attributes:
        input_ids: int64 [B, T].
        position_ids: int64 [B, T], from 0 in each document (and in the padding).
        document_ids: int64 [B, T], 0, 1, … along a row; -1 = padding.
        loss_weights: float32 [B, T], the weight of predicting ``input_ids[b, t]`` from what precedes it
            in its document: 0 on each document's first token and on padding. The objective does the shift.
        side: further tensors of an objective, [B, T] or [B, D].
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    loss_weights: Tensor
    side: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens that aren't padding."""
        return int((self.document_ids >= 0).sum())

    def to(self, device: torch.device | str) -> PackedRows:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def slice(self, start: int, stop: int) -> PackedRows:
        """Rows start … stop - 1."""
        return self._map(lambda tensor: tensor[start:stop])

    def between(self, start: int, stop: int) -> PackedRows:
        """Tokens start … stop - 1 of every row, without side tensors."""
        return PackedRows(*(getattr(self, name)[:, start:stop] for name in OWN))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, side ones too: how rows travel where only tensors do."""
        own = {name: getattr(self, name) for name in OWN}
        return own | {f"side.{name}": tensor for name, tensor in self.side.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PackedRows:
        side = {
            name.removeprefix("side."): tensor for name, tensor in tensors.items() if name.startswith("side.")
        }
        return cls(**{name: tensors[name] for name in OWN}, side=side)

    @classmethod
    def joined(cls, parts: list[PackedRows]) -> PackedRows:
        """The rows of several, one below the other."""
        tensors = [part.tensors() for part in parts]
        return cls.from_tensors({name: torch.cat([t[name] for t in tensors]) for name in tensors[0]})

    def with_rows(self, count: int) -> PackedRows:
        """The same rows, and rows of padding after them up to ``count``."""
        missing = count - self.rows
        if missing <= 0:
            return self
        padding = self.slice(0, 1)._map(
            lambda tensor: torch.zeros_like(tensor).expand(missing, *tensor.shape[1:])
        )
        ends = torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand(missing, -1)
        padding = replace(padding, position_ids=ends, document_ids=torch.full_like(ends, -1))
        return self.joined([self, padding])

    @property
    def model_weights(self) -> Tensor:
        """``loss_weights`` for what the model trains besides the objective: not on answers that were rejected."""
        role = self.side.get("role")
        return self.loss_weights if role is None else self.loss_weights * (role == 0)

    def document_lengths(self) -> list[int]:
        """Tokens of each document, row by row."""
        lengths: list[int] = []
        for row in self.document_ids.cpu():
            lengths += torch.bincount(row[row >= 0]).tolist()
        return lengths

    def _map(self, change) -> PackedRows:
        return PackedRows(
            change(self.input_ids),
            change(self.position_ids),
            change(self.document_ids),
            change(self.loss_weights),
            {name: change(tensor) for name, tensor in self.side.items()},
        )
