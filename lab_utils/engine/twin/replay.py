"""Micro-batches that are alike: each layer runs in full, forward and backward, and is replayed for the others.

All micro-batches of a step have one shape here, so a layer's next pass makes the same blocks, frees the same blocks and
calls the same collectives as the one before. What is written down of it is put into the ledger again: of the blocks
that come and go within a pass, those at its own fullest moment, which is where the step's peak lies if it lies in this
pass; and those that stay for the backward pass, one by one. Around the layers (stages, losses, optimizer)
every micro-batch runs in full.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels import _support
from lab_utils.engine.twin.collectives import Record
from lab_utils.engine.twin.ledger import Block, Ledger
from lab_utils.engine.twin.watch import Watch
from lab_utils.models.deepseek_v4.block import Layer, Pass

WORKSPACE = "workspace"


@dataclass
class Half:
    """One direction of a layer's pass."""

    flash: list[Block] = field(default_factory=list)  # blocks of its own at its fullest moment
    credit: list[Block] = field(default_factory=list)  # older ones, gone by then
    early: set[int] = field(default_factory=set)  # of those kept by the forward pass: gone by then
    late: set[int] = field(default_factory=set)  # and those still there at its end
    calls: tuple[int, int] = (0, 0)  # in the record
    flops: int = 0


@dataclass
class Seen:
    """A layer's pass in full."""

    passes: int = 0
    forward: Half | None = None
    backward: Half | None = None
    kept: list[Block] = field(default_factory=list)
    outputs: list[tuple[torch.Size, torch.dtype]] = field(
        default_factory=list
    )  # streams; KL, its count; balance
    kinds: tuple[bool, bool] = (False, False)  # whether there is a KL, a balance loss


class Replays:
    """Stands in place of ``Pass.run``.

    Args:
        run: the real one.
        full: so many passes of each layer run in full, the last of which is written down. Kernels of a CPU keep scratch
            from their first call on, so that there the second is the first that is like the others.
    """

    def __init__(self, run: Callable, ledger: Ledger, record: Record, watch: Watch, full: int) -> None:
        self.real, self.ledger, self.record, self.watch, self.full = run, ledger, record, watch, full
        self.seen: dict[tuple, Seen] = {}

    def run(self, at: Pass, block: Layer, number: int, *inputs: Tensor, context: Any = None) -> Tensor:
        """The streams after a block, as ``Pass.run`` gives them."""
        if not any(
            x.requires_grad for x in inputs
        ):  # no gradient comes back through it, in the indexer's warm-up
            return self.real(at, block, number, *inputs, context=context)
        seen = self.seen.setdefault((number, *(tuple(x.shape) for x in inputs)), Seen())
        seen.passes += 1
        if seen.passes < self.full:
            h_BTnD = self.real(at, block, number, *inputs, context=context)
            name_workspaces(self.ledger)
            self.ledger.settle()
            return h_BTnD
        if seen.passes == self.full:
            return self._written_down(seen, at, block, number, inputs, context)
        h_BTnD, *rest = _Replayed.apply(self, seen, at, *inputs)
        if seen.kinds[0]:
            at.indexer_kl.append((rest.pop(0), rest.pop(0)))
        if seen.kinds[1]:
            at.balance.append(rest.pop(0))
        return h_BTnD

    def _written_down(
        self, seen: Seen, at: Pass, block: Layer, number: int, inputs: tuple[Tensor, ...], context: Any
    ) -> Tensor:
        edges = [x for x in inputs if x.requires_grad]
        region: dict[str, Any] = {"edges": len(edges)}

        def begin() -> None:
            region["start"] = self._start()

        def end() -> None:
            region["edges"] -= 1
            if not region["edges"]:
                name_workspaces(self.ledger)
                seen.backward = self._half(region.pop("start"), seen.kept, by_its_end=True)

        inputs = tuple(_Edge.apply(x, end) if x.requires_grad else x for x in inputs)
        losses = len(at.indexer_kl), len(at.balance)
        start = self._start()
        h_BTnD = self.real(at, block, number, *inputs, context=context)
        name_workspaces(self.ledger)
        self.ledger.settle()
        found = [h_BTnD]
        seen.kinds = len(at.indexer_kl) > losses[0], len(at.balance) > losses[1]
        found += at.indexer_kl[-1] if seen.kinds[0] else ()
        found += at.balance[-1:] if seen.kinds[1] else ()
        seen.outputs = [(x.shape, x.dtype) for x in found]
        handed_on = {id(self.ledger.of(x)) for x in found}
        own = self.ledger.blocks[start[0].blocks :]
        seen.kept = [b for b in own if b.died is None and b.what != WORKSPACE and id(b) not in handed_on]
        seen.forward = self._half(start, [])
        return _Edge.apply(h_BTnD, begin)

    def _start(self) -> tuple:
        return self.ledger.now(), len(self.record.entries), self.watch.flops

    def _half(self, start: tuple, kept: list[Block], by_its_end: bool = False) -> Half:
        """What has happened since."""
        moment, calls, flops = start
        own = self.ledger.blocks[moment.blocks :]
        gone = self.ledger.deaths[moment.deaths :]
        events = sorted(
            [(b.born, b.bytes) for b in own if b.what != WORKSPACE] + [(b.died, -b.bytes) for b in gone]
        )
        total = most = 0
        at = moment.time
        for time, change in events:
            total += change
            if total > most:
                most, at = total, time
        half = Half(calls=(calls, len(self.record.entries)), flops=self.watch.flops - flops)
        there = [b for b in own if b.born <= at and (b.died is None or b.died > at)]
        half.flash = [b for b in there if b.what != WORKSPACE]
        places = {id(block): i for i, block in enumerate(kept)}
        own_ids = {id(b) for b in own}
        for block in gone:
            if id(block) in places:
                if block.died <= at:
                    half.early.add(places[id(block)])
            elif block.died <= at and id(block) not in own_ids:
                half.credit.append(block)
        if by_its_end:
            half.late = {i for i, block in enumerate(kept) if block.died is None}
        return half

    def replay(self, half: Half) -> None:
        self.ledger.flash(half.flash, half.credit)
        self.record.again(*half.calls)
        self.watch.flops += half.flops


def name_workspaces(ledger: Ledger) -> None:
    """Scratch that a CPU's kernels keep is no layer's."""
    for buffer in _support._buffers.__dict__.values():
        ledger.name(buffer, "temporary", WORKSPACE)


class _Replayed(torch.autograd.Function):
    """A layer's pass from what is written down of another."""

    @staticmethod
    def forward(ctx, replays: Replays, seen: Seen, at: Pass, *inputs: Tensor):
        replays.replay(seen.forward)
        ctx.set_materialize_grads(False)
        ctx.replays, ctx.seen, ctx.at, ctx.inputs = replays, seen, at, inputs
        ctx.held = [replays.ledger.hold(block) for block in seen.kept]
        outputs = tuple(inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in seen.outputs)
        if seen.kinds[0]:
            ctx.mark_non_differentiable(outputs[2])
        replays.ledger.settle()
        return outputs

    @staticmethod
    def backward(ctx, *_):
        replays, half, held = ctx.replays, ctx.seen.backward, ctx.held
        if half is None:
            raise RuntimeError(
                "a layer's backward pass is replayed before it has run: not in the order of micro-batches"
            )
        for i in half.early:
            replays.ledger.release(held[i])
        replays.replay(half)
        for i, block in enumerate(held):
            if i in half.late:  # what the whole micro-batch shares goes with its last layer
                weakref.finalize(ctx.at, replays.ledger.release, block)
            else:
                replays.ledger.release(block)
        wanted = ctx.needs_input_grad[3:]
        grads = [torch.empty_like(x) if need else None for x, need in zip(ctx.inputs, wanted)]
        ctx.inputs = ctx.at = ctx.held = None
        return None, None, None, *grads


class _Edge(torch.autograd.Function):
    """A place on the way of the gradient, where somebody is told."""

    @staticmethod
    def forward(ctx, x, told):
        ctx.told = told
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.told()
        return grad, None
