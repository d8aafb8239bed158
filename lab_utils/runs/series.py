"""Metrics of a run of any length in bounded memory: mean, smallest and largest value over stretches of steps.

``Series`` reads metrics.jsonl as it grows and keeps, for every metric, at most ``CAPACITY`` buckets of equally many
steps; when they are full, two become one. What it holds is what ``Run.metrics()`` says: a resumed run's steps take the
place of those that an abandoned attempt had logged.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lab_utils.runs._appended import Appended
from lab_utils.runs.steps import merge_steps
from lab_utils.telemetry import jsonl

CAPACITY = 576
STEP = "step"


class Buckets:
    """Numbers by step, thinned.

    Args:
        capacity: most buckets; an even number.

    Attributes:
        width: steps of a bucket; bucket i has those from ``i * width`` on.
        size: buckets in use, empty ones between them included.
        keys: metrics, and first ``step``: which steps of a bucket were logged.
    """

    def __init__(self, capacity: int = CAPACITY):
        self.capacity, self.width, self.size = capacity, 1, 0
        self.keys: dict[str, int] = {STEP: 0}
        self.starts: list[int | None] = [None] * capacity  # offset of each bucket's first line
        self._numbers = _empty(capacity, 16)  # [count, total, low, high] × bucket × key
        self._known: dict[tuple[str, ...], np.ndarray] = {}

    def add(self, step: int, values: Mapping[str, float], start: int | None = None) -> int:
        """Numbers of a step, none of which it had before; returns the bucket. NaN and infinities are left out."""
        while step >= self.width * self.capacity:
            self._widen()
        bucket = step // self.width
        columns = self._columns(tuple(values))
        given = np.fromiter(values.values(), float, len(values))
        finite = np.isfinite(given)
        at, given = columns[finite], given[finite]
        count, total, low, high = self._numbers[:, bucket]
        count[at] += 1
        total[at] += given
        low[at] = np.minimum(low[at], given)
        high[at] = np.maximum(high[at], given)
        self.size = max(self.size, bucket + 1)
        if self.starts[bucket] is None:
            self.starts[bucket] = start
        return bucket

    def clear(self, first: int, last: int | None = None) -> None:
        """Empty the buckets from ``first`` to before ``last``; without ``last`` they are no longer in use either."""
        end = self.size if last is None else last
        self._numbers[:, first:end] = _empty(1, 1)
        self.starts[first:end] = [None] * (end - first)
        if last is None:
            self.size = min(self.size, first)

    def table(self, first: int, last: int, keys: list[str]) -> np.ndarray:
        """Mean, smallest and largest as ``[bucket, key, 3]`` in float32; NaN where a bucket has nothing."""
        found = np.full((last - first, len(keys), 3), np.nan, dtype=np.float32)
        for place, key in enumerate(keys):
            if (column := self.keys.get(key)) is not None:
                count, total, low, high = self._numbers[:, first:last, column]
                there = count > 0
                found[there, place, 0] = total[there] / count[there]
                found[there, place, 1] = low[there]
                found[there, place, 2] = high[there]
        return found

    def has(self, key: str) -> bool:
        """Whether a metric has any number."""
        column = self.keys.get(key)
        return column is not None and bool(self._numbers[0, : self.size, column].any())

    def _columns(self, keys: tuple[str, ...]) -> np.ndarray:
        """Where metrics stand; nearly every line has the same."""
        if keys not in self._known:
            for key in keys:
                self.keys.setdefault(key, len(self.keys))
            while len(self.keys) > self._numbers.shape[2]:
                more = _empty(self.capacity, self._numbers.shape[2])
                self._numbers = np.concatenate([self._numbers, more], axis=2)
            if len(self._known) > 50:
                self._known.clear()
            self._known[keys] = np.array([self.keys[key] for key in keys], dtype=int)
        return self._known[keys]

    def _widen(self) -> None:
        """Two buckets become one."""
        half = self.capacity // 2
        old, self._numbers = self._numbers, _empty(self.capacity, self._numbers.shape[2])
        even, odd = old[:, 0::2], old[:, 1::2]
        self._numbers[:2, :half] = even[:2] + odd[:2]
        self._numbers[2, :half] = np.minimum(even[2], odd[2])
        self._numbers[3, :half] = np.maximum(even[3], odd[3])
        pairs = zip(self.starts[0::2], self.starts[1::2])
        self.starts = [a if a is not None else b for a, b in pairs] + [None] * half
        self.width, self.size = self.width * 2, (self.size + 1) // 2


def _empty(buckets: int, keys: int) -> np.ndarray:
    found = np.zeros((4, buckets, keys))
    found[2], found[3] = np.inf, -np.inf
    return found


class Series:
    """metrics.jsonl of a run, followed.

    Args:
        path: the file; it need not be there yet.
        capacity: points a metric at most.

    Attributes:
        buckets: the thinned numbers.
        newest: the last step that was logged, -1 before the first.
    """

    def __init__(self, path: Path, capacity: int = CAPACITY):
        self._file, self._capacity = Appended(path), capacity
        self._reset()

    def _reset(self) -> None:
        self.buckets = Buckets(self._capacity)
        self.newest = -1
        self._values: dict[str, float] = {}  # of the newest step
        self._last: dict[str, tuple[int, float]] = {}
        self._times: deque[tuple[int, float]] = deque(maxlen=60)
        self._changed: int | None = None
        self._width = 1  # as of the last question

    def poll(self, until: float = math.inf) -> bool:
        """Take up what was added, until that moment of the monotonic clock; returns whether there is more."""
        while True:
            part = self._file.read()
            if part.afresh:
                self._reset()
                self._changed = 0
            for offset, line in part.lines:
                if (row := jsonl.parse(line)) is not None:
                    self._row(row, offset, offset + len(line) + 1)
            if not part.behind or time.monotonic() > until:
                return part.behind

    def changed(self) -> int | None:
        """The first bucket that is another one since the last question; None if none is."""
        first, self._changed = self._changed, None
        if self.buckets.width != self._width:
            first, self._width = 0, self.buckets.width
        return first

    def latest(self) -> dict[str, float]:
        """The newest value of every metric; NaN for one that was not a number."""
        found = {key: value for key, (_, value) in self._last.items()}
        for key in self.buckets.keys:  # of an attempt before, whose later steps went
            if key not in found and key != STEP and self.buckets.has(key):
                means = self.buckets.table(0, self.buckets.size, [key])[:, 0, 0]
                found[key] = float(means[np.isfinite(means)][-1])
        return found

    def seconds_a_step(self) -> float | None:
        """Wall time of a step over the last lines of this attempt, evaluations and checkpoints included."""
        if len(self._times) < 2:
            return None
        (step, begun), (newest, ended) = self._times[0], self._times[-1]
        return (ended - begun) / (newest - step) if newest > step and ended > begun else None

    # -- lines -----------------------------------------------------------------------------------------------------

    def _row(self, row: dict[str, Any], start: int, end: int) -> None:
        if (step := _step(row)) is None:
            return
        values = {key: _number(value) for key, value in row.items() if key not in (STEP, "time")}
        if step < self.newest:
            self._begin_again(step, start)
        if step != self.newest:
            self._values = {}
            self._mark(self.buckets.add(step, {STEP: float(step), **values}, start))
        elif any(not _same(self._values[key], value) for key, value in values.items() if key in self._values):
            self._recount(step // self.buckets.width, end, step + 1)
        else:
            new = {key: value for key, value in values.items() if key not in self._values}
            self._mark(self.buckets.add(step, new))
        self.newest = step
        self._values |= values
        self._last |= {key: (step, value) for key, value in values.items()}
        if isinstance(row.get("time"), int | float):
            self._times.append((step, float(row["time"])))

    def _begin_again(self, step: int, start: int) -> None:
        """A resumed run goes on from here: what was logged from this step on is void."""
        bucket = step // self.buckets.width
        self.buckets.clear(bucket + 1)
        self._recount(bucket, start, step)
        self._last = {key: (at, value) for key, (at, value) in self._last.items() if at < step}
        self._times.clear()

    def _recount(self, bucket: int, end: int, below: int) -> None:
        """Make a bucket anew from the lines that begin before offset ``end``, with its steps below ``below``."""
        width, start = self.buckets.width, self.buckets.starts[bucket]
        self.buckets.clear(bucket, bucket + 1)
        if bucket == 0:
            self.buckets = Buckets(self._capacity)  # few steps are left: each may have a bucket again
        self._mark(bucket)
        if start is None:
            return
        steps = range(bucket * width, min((bucket + 1) * width, below))
        for step, values in sorted(merge_steps(self._lines(start, end, steps)).items()):
            if step in steps:
                numbers = {key: _number(value) for key, value in values.items() if key != "time"}
                self.buckets.add(step, {STEP: float(step), **numbers}, start)

    def _lines(self, start: int, end: int, steps: range) -> Iterator[dict[str, Any]]:
        """Rows between two offsets; of steps that don't matter the number alone."""
        try:
            with self._file.path.open("rb") as stream:
                stream.seek(start)
                while stream.tell() < end and (line := stream.readline()):
                    row = jsonl.parse(line)
                    if row is not None and (step := _step(row)) is not None:
                        yield row if step in steps else {STEP: step}
        except OSError:  # it went away this moment: the next look begins again
            return

    def _mark(self, bucket: int) -> None:
        self._changed = bucket if self._changed is None else min(self._changed, bucket)


def _step(row: Mapping[str, Any]) -> int | None:
    step = row.get(STEP)
    return step if isinstance(step, int) and 0 <= step < 2**53 else None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
