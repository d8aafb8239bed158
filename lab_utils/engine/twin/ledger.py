"""Every block of device memory of a step: when it came, when it went, what it was for.

A block is the storage under one or more tensors; views share it and count once. Time is a counter of events. What a
block is for may be found out late (a tensor turns out to be kept for the backward pass when its layer has ended), so
kinds are read at the end, at the moment of the peak.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

GIB = 2**30
KINDS = ("weights", "gradients", "masters", "moments", "activations", "streams", "exchange", "temporary")


@dataclass(slots=True)
class Block:
    """``died`` is None while it lives; ``kind`` is empty until somebody says what it is for (then: temporary)."""

    bytes: int
    born: int
    died: int | None = None
    kind: str = ""
    what: str = ""  # name of a tensor, or the operator that made it
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Moment:
    """A point on a ledger: blocks, deaths and time up to it."""

    blocks: int
    deaths: int
    time: int


@dataclass(frozen=True)
class Peak:
    """The fullest moment: bytes in all, by kind, and the blocks of it, largest first."""

    bytes: int
    by_kind: dict[str, int]
    blocks: list[Block] = field(repr=False)


class Ledger:
    """The blocks of one device, from the storages of fake tensors."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.deaths: list[Block] = []  # in order
        self.time = 0
        self._alive: dict[int, tuple[weakref.ref, Block]] = {}  # by the address of a storage
        self._unnamed: list[Block] = []  # alive or not, since the last ``settle``

    def see(self, tensor: torch.Tensor, what: str) -> None:
        """Take up a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self._alive.get(key)
        if found is not None and found[0]() is storage:
            return
        block = Block(storage.nbytes(), self._tick(), what=what, shape=tuple(tensor.shape))
        self.blocks.append(block)
        self._unnamed.append(block)
        self._alive[key] = (weakref.ref(storage, lambda ref: self._freed(key, ref)), block)

    def of(self, tensor: torch.Tensor) -> Block | None:
        """The block under a tensor."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return found[1] if found else None

    def name(self, tensor: torch.Tensor, kind: str, what: str = "", *, keep: bool = False) -> None:
        """Say what the block under a tensor is for; ``keep``: unless somebody has said before."""
        block = self.of(tensor)
        if block is not None and not (keep and block.kind):
            block.kind, block.what = kind, what or block.what

    def settle(self) -> None:
        """Whatever is alive now and has no kind has outlived its layer's forward pass: it is kept for the backward."""
        for block in self._unnamed:
            if block.died is None and block.kind in ("", "exchange"):
                block.kind = "activations"
        self._unnamed.clear()

    def pass_over(self) -> None:
        """Whatever is alive now and has no kind stays without (what a backward pass leaves)."""
        self._unnamed.clear()

    # -- without storages: what a replay puts in ----------------------------------------------------------------------

    def hold(self, like: Block) -> Block:
        """A block as another was, from now on."""
        block = Block(like.bytes, self._tick(), None, like.kind, like.what, like.shape)
        self.blocks.append(block)
        return block

    def release(self, block: Block) -> None:
        if block.died is None:
            block.died = self._tick()
            self.deaths.append(block)

    def flash(self, blocks: Iterable[Block], credit: Iterable[Block] = ()) -> None:
        """One moment in which these are there besides, and the blocks of ``credit`` are not."""
        now = self._tick()
        end = self._tick()
        for sign, some in ((1, blocks), (-1, credit)):
            for each in some:
                self.blocks.append(Block(sign * each.bytes, now, end, each.kind, each.what, each.shape))

    # -- looking back -------------------------------------------------------------------------------------------------

    def now(self) -> Moment:
        return Moment(len(self.blocks), len(self.deaths), self.time)

    def peak(self, first: int = 0) -> Peak:
        """The fullest moment of all, or of those from time ``first`` on."""
        events: dict[int, int] = {}
        for block in self.blocks:
            events[block.born] = events.get(block.born, 0) + block.bytes
            if block.died is not None:
                events[block.died] = events.get(block.died, 0) - block.bytes
        total = most = at = 0
        for time in sorted(events):
            total += events[time]
            if total > most and time >= first:
                most, at = total, time
        there = [b for b in self.blocks if b.born <= at and (b.died is None or b.died > at)]
        by_kind = dict.fromkeys(KINDS, 0)
        for block in there:
            by_kind[block.kind or "temporary"] += block.bytes
        return Peak(most, by_kind, sorted(there, key=lambda block: -block.bytes))

    def most(self, kind: str) -> int:
        """The most bytes of a kind that there were at any moment."""
        events = [(b.born, b.bytes) for b in self.blocks if b.kind == kind]
        events += [(b.died, -b.bytes) for b in self.blocks if b.kind == kind and b.died is not None]
        total = most = 0
        for _, change in sorted(events):
            total += change
            most = max(most, total)
        return most

    def held(self) -> dict[str, int]:
        """Bytes alive now by kind."""
        found = dict.fromkeys(KINDS, 0)
        for block in self.blocks:
            if block.died is None:
                found[block.kind or "temporary"] += block.bytes
        return found

    def _freed(self, key: int, ref: weakref.ref) -> None:
        if self._alive[key][0] is not ref:
            return
        _, block = self._alive.pop(key)
        block.died = self._tick()
        self.deaths.append(block)

    def _tick(self) -> int:
        self.time += 1
        return self.time
