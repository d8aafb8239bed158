"""``<run>/chips/node-<k>.jsonl``: what the chips of a run did, read back; and the energy that they took.

A row is {"time", "chip/power_total", "joules", "chip/util_mean", …, "chips": [{"index", "name", "util", "used_mib",
"total_mib", "power", "temp", "health", …}]}: one node at one moment. What no chip said is absent. ``joules`` is what
the node has spent since the run began, over all attempts; the first row of an attempt has ``"first": true``.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from lab_utils.telemetry import jsonl

FOLDER = "chips"
JOULES_PER_KWH = 3.6e6
# Intervals between samples that a gap may last and still be bridged by a straight line.
GAP = 5.0
MAX_TAIL = 4 * 2**20

_NODE = re.compile(r"node-(\d+)\.jsonl")
_HEAD = re.compile(rb'\{"time": ([\d.]+), "chip/power_total": ([\d.]+)[,}]')
_TIME = re.compile(rb'"time": ([\d.]+)')
_FIRST = re.compile(rb'\{"time": ([\d.]+), "first": true')


def node_file(run_path: Path | str, node: int) -> Path:
    """Where node ``node`` writes."""
    return Path(run_path) / FOLDER / f"node-{node}.jsonl"


def node_files(run_path: Path | str) -> list[Path]:
    """The samples of every node that has any, in the order of the nodes' numbers."""
    found = {int(m[1]): p for p in (Path(run_path) / FOLDER).glob("*") if (m := _NODE.fullmatch(p.name))}
    return [found[number] for number in sorted(found)]


def node_of(path: Path) -> int:
    """The number of the node that a file is of."""
    match = _NODE.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def newest_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a file, from its end: the same few kilobytes however long the run is."""
    size = 8 * 2**10  # sixteen chips take about 2.5 KiB
    while True:
        rows, whole = jsonl.newest(path, size)
        if rows or whole or size >= MAX_TAIL:
            return rows[-1] if rows else None
        size *= 4


def newest(run_path: Path | str) -> dict[int, dict[str, Any]]:
    """The last row of each node, by its number."""
    rows = {node_of(path): newest_row(path) for path in node_files(run_path)}
    return {node: row for node, row in rows.items() if row is not None}


class Meter:
    """Energy by the trapezoid rule, while samples come in.

    Args:
        spent: joules of earlier attempts; None: no power has been known so far.
    """

    def __init__(self, spent: float | None = None):
        self.joules = spent
        self._last: tuple[float, float] | None = None

    def add(self, time: float, watts: float | None, limit: float) -> float | None:
        """A sample; returns the joules so far.

        Args:
            time: seconds, on any clock; one that steps back starts anew.
            watts: None where no chip said: the next sample bridges it, if it comes within ``limit``.
            limit: longest gap in seconds that is bridged.
        """
        if watts is None:
            return self.joules
        self.joules = self.joules or 0.0
        if self._last is not None and 0 < time - self._last[0] <= limit:
            self.joules += (time - self._last[0]) * (watts + self._last[1]) / 2
        self._last = (time, watts)
        return self.joules


@dataclass(frozen=True)
class Energy:
    """What the chips of a run took, over all nodes and attempts.

    Attributes:
        kwh: None where no chip says its power, as on CPU.
        seconds: time in which at least one node's power is known.
        chips: chips of all nodes.
        watts_mean: of all chips together, over ``seconds``; None as ``kwh``.
        covered: share of the run's time, of all its nodes, that has samples of power, 0–1. The rest is in no number:
            energy of a run with 0.9 covered was about a ninth more.
    """

    kwh: float | None
    seconds: float
    chips: int
    watts_mean: float | None
    covered: float

    def joules_per_token(self, tokens: float) -> float | None:
        """Of ``tokens`` trained on; None where the energy or the number of tokens isn't known."""
        return self.kwh * JOULES_PER_KWH / tokens if self.kwh is not None and tokens else None


def energy(run_path: Path | str) -> Energy:
    """Integral of the chips' power over time by the trapezoid rule, node by node.

    A gap longer than ``GAP`` times the usual interval is not bridged: nobody knows what happened in it.
    """
    run_path = Path(run_path)
    files = node_files(run_path)
    spans = _Spans(files)
    joules, measured, chips, pieces = 0.0, 0.0, 0, []
    for path in files:
        samples = []
        for time, watts in _samples(path):
            spans.add(time, path)
            if watts is not None:
                samples.append((time, watts))
        samples.sort()
        limit = GAP * median(b[0] - a[0] for a, b in pairwise(samples)) if len(samples) > 1 else 0.0
        for (start, before), (end, after) in pairwise(samples):
            if 0 < end - start <= limit:
                joules += (end - start) * (before + after) / 2
                measured += end - start
                pieces.append((start, end))
        chips += len((newest_row(path) or {}).get("chips", ()))
    for time in _times(run_path / "metrics.jsonl"):
        spans.add(time)
    seconds, expected = _union(pieces), spans.total()
    return Energy(
        kwh=joules / JOULES_PER_KWH if pieces else None,
        seconds=seconds,
        chips=chips,
        watts_mean=joules / seconds if pieces else None,
        covered=min(measured / expected, 1.0) if expected else 0.0,
    )


def _samples(path: Path) -> Iterator[tuple[float, float | None]]:
    """Time and watts of every row. Our own rows begin with both: no need to parse the rest."""
    with path.open("rb") as stream:
        for line in stream:
            if match := _HEAD.match(line):
                yield float(match[1]), float(match[2])
            elif (row := jsonl.parse(line)) and "time" in row:
                known = [c["power"] for c in row.get("chips", ()) if c.get("power") is not None]
                watts = row.get("chip/power_total", sum(known) if known else None)
                yield float(row["time"]), watts


def _times(path: Path, pattern: re.Pattern[bytes] = _TIME) -> Iterator[float]:
    """Times of a file's lines, which stand near their beginning."""
    try:
        with path.open("rb") as stream:
            for line in stream:
                if match := pattern.search(line, 0, 80):
                    yield float(match[1])
    except FileNotFoundError:
        return


class _Spans:
    """When the run was running and on which nodes: from the start of each attempt to its last sign of life.

    The sampler marks the first row of each attempt; those of the first node tell the attempts apart.
    """

    def __init__(self, files: list[Path]):
        self.starts = list(_times(files[0], _FIRST)) if files else []
        self._ends: dict[int, tuple[float, float]] = {}
        self._nodes: dict[int, set[Path]] = {}

    def add(self, time: float, node: Path | None = None) -> None:
        """A sign of life, of one node or of the run."""
        attempt = max(bisect_right(self.starts, time), 1)
        first, last = self._ends.get(attempt, (time, time))
        self._ends[attempt] = min(first, time), max(last, time)
        if node is not None:
            self._nodes.setdefault(attempt, set()).add(node)

    def total(self) -> float:
        """Seconds of all attempts, each times its nodes."""
        return sum((b - a) * len(self._nodes.get(attempt, ())) for attempt, (a, b) in self._ends.items())


def _union(pieces: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(pieces):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
