"""What a rank asks of the others, in order; and whether all the ranks of a job ask it of one another.

An entry is written when torch.distributed is called. Entries of one batch of messages share a ``step``: they are posted
together, and the rank goes on when all are done. Everything else is a step of its own, which all ranks of its group
must reach together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

MESSAGES = ("send", "recv", "send_object", "recv_object")


@dataclass(frozen=True)
class Collective:
    """One call.

    Attributes:
        bytes: that this rank hands in (recv: gets); 0 of Python objects, whose size is not known.
        sent: bytes that it sends over the wire, as ``engine.traffic`` counts them.
        peer: of a message, the other rank.
        step: its place in the rank's order; entries of one batch share it.
        uneven: an all-to-all whose sizes come from the routing.
    """

    kind: str
    group: str
    ranks: tuple[int, ...]
    dtype: str = ""
    bytes: int = 0
    sent: int = 0
    peer: int | None = None
    step: int = 0
    uneven: bool = False


class Record:
    """The calls of one rank."""

    def __init__(self) -> None:
        self.entries: list[Collective] = []
        self._step = 0

    def add(self, *batch: Collective) -> None:
        self.entries += [replace(entry, step=self._step) for entry in batch]
        self._step += 1

    def again(self, start: int, stop: int) -> None:
        """The calls ``[start, stop)`` once more, in their steps."""
        last: int | None = None
        for entry in self.entries[start:stop]:
            if last is not None and entry.step != last:
                self._step += 1
            last = entry.step
            self.entries.append(replace(entry, step=self._step))
        if last is not None:
            self._step += 1


def to_json(entries: Sequence[Collective]) -> dict[str, Any]:
    """All calls in order, for a file: groups once, a row for each call."""
    groups: dict[tuple[int, ...], int] = {}
    rows = []
    for e in entries:
        group = groups.setdefault(e.ranks, len(groups))
        rows.append([e.step, e.kind, e.group, group, e.dtype, e.bytes, e.sent, e.peer, e.uneven])
    return {"groups": [list(ranks) for ranks in groups], "calls": rows}


def from_json(tree: dict[str, Any]) -> list[Collective]:
    """What ``to_json`` wrote."""
    groups = [tuple(ranks) for ranks in tree["groups"]]
    return [
        Collective(kind, name, groups[group], dtype, size, sent, peer, step, uneven)
        for step, kind, name, group, dtype, size, sent, peer, uneven in tree["calls"]
    ]


def summary(entries: Sequence[Collective]) -> list[dict[str, Any]]:
    """Calls alike added up, in the order of the first of each: ``kind``, ``group``, ``group_size``, ``ranks`` (of
    groups of 16 or fewer, else the first and the last), ``dtype``, ``count``, ``bytes`` and ``sent`` of all."""
    found: dict[tuple, dict[str, Any]] = {}
    for entry in entries:
        key = (entry.kind, entry.group, entry.ranks, entry.dtype, entry.peer)
        row = found.setdefault(
            key,
            {
                "kind": entry.kind,
                "group": entry.group,
                "group_size": len(entry.ranks),
                "ranks": list(entry.ranks) if len(entry.ranks) <= 16 else [entry.ranks[0], entry.ranks[-1]],
                "dtype": entry.dtype,
                "peer": entry.peer,
                "count": 0,
                "bytes": 0,
                "sent": 0,
            },
        )
        row["count"] += 1
        row["bytes"] += entry.bytes
        row["sent"] += entry.sent
    return list(found.values())


@dataclass(frozen=True)
class Mismatch:
    """Where ranks would wait for one another for ever, or exchange other bytes than expected."""

    ranks: tuple[int, ...]
    sentence: str


def check(orders: dict[int, Sequence[Collective]]) -> list[Mismatch]:
    """Play the calls of some ranks against one another.

    A call waits for those ranks of its group that are here; a message for its counterpart, where that rank is here.
    The play stops at the first mismatch: what follows it would not be reached.

    Args:
        orders: by rank, what each asks, in order.
    """
    queues = {rank: _steps(entries) for rank, entries in sorted(orders.items())}
    at = dict.fromkeys(queues, 0)
    posted = {rank: _posted(queues, at, rank) for rank in queues}
    while True:
        moved = False
        for rank in queues:
            if at[rank] == len(queues[rank]):
                continue
            step = queues[rank][at[rank]]
            if step[0].kind in MESSAGES:
                found = _exchange(rank, posted)
                if found:
                    return [found]
                done = [rank] if not posted[rank] else []
            else:
                done, found = _meet(rank, step[0], queues, at)
                if found:
                    return [found]
            for each in done:
                at[each] += 1
                posted[each] = _posted(queues, at, each)
                moved = True
        if not moved:
            break
    waiting = [rank for rank in queues if at[rank] < len(queues[rank])]
    return [_hang(waiting, queues, at)] if waiting else []


def _steps(entries: Sequence[Collective]) -> list[list[Collective]]:
    steps: list[list[Collective]] = []
    for entry in entries:
        if steps and steps[-1][0].step == entry.step:
            steps[-1].append(entry)
        else:
            steps.append([entry])
    return steps


def _posted(queues: dict[int, list], at: dict[int, int], rank: int) -> list[Collective]:
    """Messages of the rank's present step that wait for a counterpart which is here."""
    if at[rank] >= len(queues[rank]):
        return []
    return [entry for entry in queues[rank][at[rank]] if entry.kind in MESSAGES and entry.peer in queues]


def _exchange(rank: int, posted: dict[int, list[Collective]]) -> Mismatch | None:
    """Match this rank's messages with those posted at their other ends."""
    for mine in list(posted[rank]):
        counterpart = (
            mine.kind.replace("send", "recv") if "send" in mine.kind else mine.kind.replace("recv", "send")
        )
        for theirs in posted[mine.peer]:
            if theirs.peer != rank or theirs.kind != counterpart:
                continue
            if (theirs.bytes, theirs.dtype) != (mine.bytes, mine.dtype):
                return Mismatch(
                    (rank, mine.peer),
                    f"Rank {rank} has {_words(mine)} and rank {mine.peer} has {_words(theirs)}: shapes or dtypes "
                    f"between these stages differ.",
                )
            posted[rank].remove(mine)
            posted[mine.peer].remove(theirs)
            break
    return None


def _meet(
    rank: int, call: Collective, queues: dict[int, list], at: dict[int, int]
) -> tuple[list[int], Mismatch | None]:
    """The ranks that pass a call together, [] while some are on their way; or how theirs differ."""
    here = [r for r in call.ranks if r in queues]
    others: dict[int, Collective] = {}
    for r in here:
        if at[r] == len(queues[r]):
            return [], None
        theirs = queues[r][at[r]][0]
        if theirs.kind in MESSAGES or theirs.ranks != call.ranks:
            return [], None
        others[r] = theirs
    for r, theirs in others.items():
        if _signature(theirs) != _signature(call):
            return [], Mismatch(
                (rank, r),
                f"In the group {call.group} of {len(call.ranks)} ranks, rank {rank} asks for {_words(call)} where rank "
                f"{r} asks for {_words(theirs)}: they would wait for ever or mix up bytes.",
            )
    return here, None


def _signature(call: Collective) -> tuple:
    """What must be the same on all ranks; an uneven all-to-all hands in what the routing gave."""
    return call.kind, call.dtype, call.uneven, 0 if call.uneven else call.bytes


def _hang(waiting: list[int], queues: dict[int, list], at: dict[int, int]) -> Mismatch:
    shown = []
    for rank in waiting[:4]:
        call = queues[rank][at[rank]][0]
        shown.append(f"rank {rank} at {_words(call)} (step {call.step} of its order)")
    more = f" and {len(waiting) - 4} more" if len(waiting) > 4 else ""
    return Mismatch(
        tuple(waiting),
        f"The step would hang: {'; '.join(shown)}{more} wait for calls that the others don't make in this order.",
    )


def _words(call: Collective) -> str:
    peer = "" if call.peer is None else f" {'to' if 'send' in call.kind else 'from'} rank {call.peer}"
    return f"{call.kind}{peer} in {call.group} of {call.bytes:,} bytes {call.dtype}".rstrip()
