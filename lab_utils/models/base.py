"""What the rest of the house knows of a model: packed rows in, final hidden states and auxiliary losses out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lab_utils.telemetry.reductions import Metric


@dataclass
class AuxiliaryLoss:
    """A loss beside the objective: ``weight · total / count``, with total and count summed over the global batch."""

    total: Tensor  # fp32 scalar, a sum
    count: Tensor  # fp32 scalar, what the sum runs over
    weight: float


@dataclass
class ModelOutput:
    """Result of a forward pass over packed rows ``[B, T]``."""

    hidden_BTD: Tensor  # after the final norm: what the LM head multiplies
    auxiliary: dict[str, AuxiliaryLoss] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)


@dataclass
class RoutingRecord:
    """The experts that one forward pass over rows ``[B, T]`` gave to each token; another may be made to take them.

    ``experts``: a tensor ``[B·T, k]`` of small integers for every MoE layer in the model's order, layers with a token
    table included; those of multi-token prediction, where that ran, come last.
    """

    experts: list[Tensor] = field(default_factory=list)

    def to_rows(self, rows: int) -> Tensor:
        """As a side tensor of packed rows ``[B, T, L, k]``, L layers: it is cut into micro-batches with them."""
        return torch.stack(self.experts, 1).unflatten(0, (rows, -1))

    @classmethod
    def from_rows(cls, experts_BTLk: Tensor) -> RoutingRecord:
        return cls([each.flatten(0, 1) for each in experts_BTLk.unbind(2)])


@runtime_checkable
class TrainableModel(Protocol):
    """An ``nn.Module`` that trains on packed rows. Documents of a row never see one another.

    A model with auxiliary losses also has ``auxiliary_counts(position_ids, document_ids, loss_weights)``: by name, what
    each of them will be a mean over, so that micro-batches add up to the global batch's mean. Its forward pass then
    takes ``loss_weights`` too, ``[B, T]`` as the objective gets them.

    A mixture of experts also has ``finish_step(all_reduce, applied) -> dict[str, Metric]``, to be called after each
    optimizer step; ``record_routing()``, a context that gives the ``RoutingRecord`` of the forward pass inside; and
    takes such a record as ``routing`` in its forward pass, from ``PackedRows.side["routing"]`` where that is there.
    """

    config: Any  # transformers configuration

    def __call__(self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor) -> ModelOutput: ...

    @property
    def head_weight(self) -> Tensor:
        """Weight of the LM head ``[V, D]``."""

    def flops_per_token(self, document_lengths: list[int]) -> float:
        """Training FLOPs per token for documents of these lengths (length-weighted mean)."""
