"""The chips of a run as they are now: newest reading of every node, and how its use went lately."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab_utils.runs._appended import Appended
from lab_utils.telemetry import chip_log, jsonl
from lab_utils.telemetry.chips import unhealthy

TAIL = 32 * 2**10  # bytes of a file that are read at most: about ten rows of sixteen chips
LIST_SECONDS = 10.0  # between looks for nodes that have begun to write
HISTORY = 60


@dataclass
class Node:
    """One node.

    Attributes:
        number: as in the file's name.
        time: of the newest reading, seconds since the epoch.
        chips: its rows, as in ``telemetry/chip_log.py``.
        history: ``(time, mean use, use of the idlest chip)`` of the last readings, in percent; oldest first.
        interval: usual seconds between readings; None before the second.
    """

    number: int
    time: float = 0.0
    chips: list[dict[str, Any]] = field(default_factory=list)
    history: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    interval: float | None = None

    def take(self, row: dict[str, Any]) -> None:
        """A row of the node's file."""
        at, chips = row.get("time"), row.get("chips")
        if not isinstance(at, int | float) or not isinstance(chips, list):
            return
        if 0 < at - self.time < 600:
            self.interval = at - self.time
        self.time, self.chips = float(at), [chip for chip in chips if isinstance(chip, dict)]
        used = [chip["util"] for chip in self.chips if isinstance(chip.get("util"), int | float)]
        if used:
            self.history.append((self.time, sum(used) / len(used), min(used)))

    def badness(self, now: float) -> tuple[int, bool, float]:
        """Sorts nodes, the worst last: chips in bad health, silence, then the idlest chip over the last readings."""
        lately = [low for _, _, low in list(self.history)[-5:]]
        idle = -sum(lately) / len(lately) if lately else -100.0
        return sum(map(unhealthy, self.chips)), self.silent(now), idle

    def silent(self, now: float) -> bool:
        """Whether readings have stopped coming."""
        return now - self.time > max(30.0, 10 * (self.interval or 0.0))


class ChipFeed:
    """``chips/node-*.jsonl`` of a run, followed."""

    def __init__(self, run_path: Path):
        self._path, self._listed = run_path, -LIST_SECONDS
        self._files: list[tuple[int, Appended]] = []
        self._next = 0
        self.nodes: dict[int, Node] = {}

    def poll(self, until: float) -> tuple[set[int], bool]:
        """The nodes that have a newer reading, and whether others are still to be looked at."""
        if time.monotonic() - self._listed > (LIST_SECONDS if self._files else 1.0):
            self._list()
        changed: set[int] = set()
        for count in range(len(self._files)):
            if count and time.monotonic() > until:
                return changed, True
            number, file = self._files[self._next % len(self._files)]
            self._next += 1
            part = file.read(most=2 * TAIL)
            if part.afresh:
                self.nodes.pop(number, None)
            if part.lines:
                node = self.nodes.setdefault(number, Node(number))
                for _, line in part.lines:
                    if (row := jsonl.parse(line)) is not None:
                        node.take(row)
                changed.add(number)
        return changed, False

    def worst_first(self, now: float) -> list[Node]:
        """All nodes; see ``Node.badness``."""
        return sorted(self.nodes.values(), key=lambda node: (node.badness(now), -node.number), reverse=True)

    def _list(self) -> None:
        known = {number for number, _ in self._files}
        found = [(chip_log.node_of(path), path) for path in chip_log.node_files(self._path)]
        self._files += [(n, Appended(path, newest=TAIL, lazily=True)) for n, path in found if n not in known]
        self._listed = time.monotonic()
