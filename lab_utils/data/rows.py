"""Packed rows: the one shape in which data meets a model. ``B`` rows, ``T`` tokens, ``D`` documents a row."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


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
