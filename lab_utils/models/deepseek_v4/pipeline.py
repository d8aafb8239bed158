"""A DeepSeek-V4 in stages: which layers stand where, and the forward pass of one stage.

Stages hand on the streams ``[B, T, n, D]`` and nothing else. Every stage gets the whole micro-batch, so that hash
layers, positions and multi-token prediction have the token ids wherever they stand. An auxiliary loss enters the
backward pass in the stage where it arises: it is tied to the streams that the stage hands on.

Multi-token prediction stands on the last stage, behind the last layer; it embeds tokens, so that the first and the last
stage both hold the embedding, and sum its gradient (``both_ends``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lab_utils.models.base import AuxiliaryLoss, ModelOutput, RoutingRecord


@dataclass
class Stage:
    """What a rank of a pipeline holds, and what the engine tells and asks it.

    Args:
        ranges: layers ``[start, stop)`` of each virtual stage of this rank.
        number, group: of this rank's stage among the pipeline's, and the group of their ranks, by stage.
        counts: by name, what the auxiliary losses of the global batch are means over; set before each step.
        found: auxiliary losses of the micro-batches since the engine last took them, detached.
    """

    ranges: list[tuple[int, int]]
    number: int = 0
    group: Any = None
    counts: dict[str, float] = field(default_factory=dict)
    found: list[tuple[str, AuxiliaryLoss]] = field(default_factory=list)

    def share(self, name: str, loss: AuxiliaryLoss) -> Tensor:
        """What an auxiliary loss adds to the loss of the global batch; kept for the metrics."""
        detached = AuxiliaryLoss(loss.total.detach(), loss.count, loss.weight)
        self.found.append((name, detached))
        return loss.total * (loss.weight / max(self.counts.get(name, 0.0), 1.0))

    def take(self) -> list[tuple[str, AuxiliaryLoss]]:
        """The losses found since the last call."""
        found, self.found = self.found, []
        return found

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    def in_file(self, run: Callable[[Tensor | None, int, int], Tensor], shape: tuple[int, ...], like: Tensor):
        """One batch through all stages, one after the other, without a schedule: a step of decoding.

        Args:
            run: ``(streams, start, stop)`` to the streams after those layers; None comes before the first.
            shape: of the streams; like: a tensor of their dtype and device.

        Returns:
            The streams after the last layer, on the last stage; None on the others.
        """
        last = len(self.ranges) * self.count - 1
        h = None
        for turn in range(last + 1):
            at, peers = divmod(turn, self.count)
            if peers != self.number:
                continue
            if turn:
                h = like.new_empty(shape)
                dist.recv(h, self._rank(turn - 1), group=self.group)
            h = run(h, *self.ranges[at])
            if turn < last:
                dist.send(h.contiguous(), self._rank(turn + 1), group=self.group)
                h = None
        return h

    def from_last(self, x: Tensor) -> Tensor:
        """The last stage's tensor, on all stages; the others' memory is written to."""
        dist.broadcast(x, self._rank(self.count - 1), group=self.group)
        return x

    def gathered(self, value: Any) -> list[Any]:
        """A Python value of each stage, on all of them."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.group)
        return found

    def _rank(self, turn: int) -> int:
        return dist.get_global_rank(self.group, turn % self.count)


def held_modules(model: nn.Module, ranges: list[tuple[int, int]], first: bool, last: bool) -> list[nn.Module]:
    """Modules of a rank that holds these ranges of layers."""
    decoder = model.model
    held: list[nn.Module] = [decoder.layers[i] for start, stop in ranges for i in range(start, stop)]
    if first or (last and len(model.mtp)):
        held.append(decoder.embed_tokens)
    if last:
        held += [decoder.hc_head, decoder.norm, model.head, *model.mtp]
    return held


def stage_forward(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    document_ids: Tensor,
    loss_weights: Tensor | None = None,
    streams: Tensor | None = None,
    stage_index: tuple[int, int] | None = None,
    *,
    stages: Any,
    **batch: Tensor,
) -> dict[str, Tensor] | ModelOutput:
    """One stage on packed rows ``[B, T]``; under context parallelism, on this rank's run of them.

    Args:
        streams: what the stage before handed on ``[B, T, n, D]``; None in the first.
        stage_index: layers ``[start, stop)`` of this virtual stage; absent: of the rank's only one.
        stages: ColossalAI's stage manager.
        batch: other tensors of the micro-batch, which the objective reads; experts to take are in ``side.routing``.

    Returns:
        ``{"streams"}`` for the next stage; in the last one the model's output, with the auxiliary losses that arose
        there.
    """
    routing = batch.get("side.routing")
    record = None if routing is None else RoutingRecord.from_rows(routing)
    at = model.begin(input_ids, position_ids, document_ids, record)
    h_BTnD = model.embed(at.context.input_ids) if stages.is_first_stage() else streams
    start, stop = stage_index if stage_index is not None else model.stage.ranges[0]
    for number in range(start, stop):
        h_BTnD = at.run(model.model.layers[number], number, h_BTnD)
    if torch.is_grad_enabled() and not h_BTnD.requires_grad:
        # Nothing before here is trained (the indexer's warm-up), and the schedule will send a gradient all the same.
        h_BTnD = h_BTnD.detach().requires_grad_()
    if stages.is_last_stage():
        if loss_weights is not None and "side.role" in batch:
            loss_weights = loss_weights * (batch["side.role"] == 0)  # as PackedRows.model_weights
        return model.finish(at, h_BTnD, loss_weights)
    shares = [model.stage.share(name, loss) for name, loss in model.losses(at).items()]
    return {"streams": _HandOn.apply(h_BTnD, *shares)}


class _HandOn(torch.autograd.Function):
    """Streams as they are, and the losses that are tied to them: in the backward pass these get the gradient 1.

    No view of the last layer's output, which would keep the memory when the engine lets go of what was sent.
    """

    @staticmethod
    def forward(ctx, streams, *shares):
        ctx.save_for_backward(*(torch.ones_like(share) for share in shares))
        return streams.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad, *ctx.saved_tensors
