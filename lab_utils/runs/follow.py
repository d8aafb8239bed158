"""A run as it goes on, from its files alone: each look reads what was added since the one before.

    follower = Follower(run.path)
    changes = follower.poll()      # a few milliseconds, however long the run is
    follower.series.latest()       # {"train/loss": 0.31, ...}

Memory is bounded: metrics are thinned (``runs/series.py``), of chips, logs and samples only the newest is kept.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab_utils.runs._appended import Appended
from lab_utils.runs._chip_feed import ChipFeed
from lab_utils.runs._log_feed import LogFeed
from lab_utils.runs.directory import read_json
from lab_utils.runs.series import CAPACITY, Series
from lab_utils.telemetry import jsonl

CHIP_SECONDS = 2.0  # between looks at the chips: they are sampled no more often
SAMPLES, EVENTS = 12, 100
SAMPLE_BYTES = 2**19  # at the end of samples.jsonl that are read at most


@dataclass
class Changes:
    """What is new since the poll before.

    Attributes:
        bucket: the first bucket of ``series`` that is another one; None: no metrics.
        status: whether status.json says anything else.
        chips: nodes with a newer reading.
        log, samples, events: whether there are more.
        behind: there is more to read at once: poll again soon.
    """

    bucket: int | None = None
    status: bool = False
    chips: set[int] = field(default_factory=set)
    log: bool = False
    samples: bool = False
    events: bool = False
    behind: bool = False

    def __bool__(self) -> bool:
        found = self.bucket is not None, self.status, self.chips, self.log, self.samples, self.events
        return any(found)

    def __add__(self, earlier: Changes) -> Changes:
        """What is new since the poll before an earlier one."""
        buckets = [each for each in (self.bucket, earlier.bucket) if each is not None]
        return Changes(
            min(buckets, default=None),
            self.status or earlier.status,
            self.chips | earlier.chips,
            self.log or earlier.log,
            self.samples or earlier.samples,
            self.events or earlier.events,
            self.behind,
        )


class Follower:
    """Follows one run directory.

    Args:
        run_dir: its path; files may be missing yet.
        capacity: points a metric at most.

    Attributes:
        series: metrics by step.
        chips: the newest readings.
        logs: the end of the log, and errors.
        samples: the newest rows of samples.jsonl.
        events: the newest rows of events.jsonl.
        status: status.json.
    """

    def __init__(self, run_dir: str | Path, capacity: int = CAPACITY):
        self.path = Path(run_dir)
        self.series = Series(self.path / "metrics.jsonl", capacity)
        self.chips = ChipFeed(self.path)
        self.logs = LogFeed(self.path)
        self.samples: deque[dict[str, Any]] = deque(maxlen=SAMPLES)
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self.status: dict[str, Any] = {}
        self._samples = Appended(self.path / "samples.jsonl", newest=SAMPLE_BYTES)
        self._events = Appended(self.path / "events.jsonl", newest=SAMPLE_BYTES)
        self._chips_at = -CHIP_SECONDS

    def poll(self, seconds: float = 0.1) -> Changes:
        """Read what was added; stops after about so many seconds, and says so by ``behind``."""
        until = time.monotonic() + seconds
        changes = Changes()
        status = read_json(self.path / "status.json")
        changes.status = bool(status) and status != self.status
        self.status = status or self.status
        changes.behind = self.series.poll(until)
        changes.bucket = self.series.changed()
        changes.log = self.logs.poll()
        for file, rows in ((self._samples, self.samples), (self._events, self.events)):
            more, behind = _take(file, rows)
            changes.behind |= behind
            changes.samples |= more and rows is self.samples
            changes.events |= more and rows is self.events
        if time.monotonic() - self._chips_at >= CHIP_SECONDS:
            changes.chips, behind = self.chips.poll(until)
            changes.behind |= behind
            self._chips_at = -CHIP_SECONDS if behind else time.monotonic()
        return changes

    def catch_up(self) -> Changes:
        """Read all that there is now."""
        whole = self.poll(1.0)
        while whole.behind:
            whole = self.poll(1.0) + whole
        return whole

    def seconds_left(self) -> float | None:
        """Until the last step, at the pace of the last steps; None where that cannot be told yet."""
        pace = self.series.seconds_a_step()
        total, step = self.status.get("total_steps"), max(self.status.get("step") or 0, self.series.newest)
        return max(total - step, 0) * pace if pace and isinstance(total, int) else None


def _take(file: Appended, rows: deque[dict[str, Any]]) -> tuple[bool, bool]:
    """Rows that were added to a file, for their keeper; whether there were any, and whether there are more."""
    part = file.read(most=SAMPLE_BYTES)
    if part.afresh:
        rows.clear()
    found = [row for _, line in part.lines[-(rows.maxlen or 0) :] if (row := jsonl.parse(line)) is not None]
    rows.extend(found)
    return bool(found) or part.afresh, part.behind
