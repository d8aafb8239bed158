"""What a person should look at while a run goes on: each told once per episode, as an event of the run.

    alerts = Alerts(sinks.event, hot=90.0).start()
    alerts.step(7, {"train/loss": 1.2, "perf/step_time": 0.5})   # every logged line
    alerts.chips({0: row_of_node_0, 1: row_of_node_1})           # every sample of the chips
    alerts.stop()

Kinds: ``alert_nan``, ``alert_stall``, ``alert_idle``, ``alert_unhealthy``, ``alert_hot``. W&B makes a notification of
them where a run is online. Silence is noticed by a thread of its own: when a step hangs, so may everything else.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from lab_utils.telemetry.chips import Rows, unhealthy

Chip = tuple[int, int]  # node, index
SHOWN = 8  # chips that a message names


@dataclass(frozen=True)
class Limits:
    """When something is worth a word.

    Attributes:
        stall_times, stall_seconds: no line for so many times the usual interval, and at least so long: evaluations and
            checkpoints lie between lines too.
        first_seconds: no line at all so long after the start (weights load, the first collectives connect).
        idle_percent, idle_samples, idle_seconds: a chip's use below, in so many samples in a row, over so long.
        hot: °C of a chip; None: of no concern, as on CPU. Over when ``cool`` below it.
        clean_lines: lines without a fault after which the next fault is news again.
    """

    stall_times: float = 10.0
    stall_seconds: float = 600.0
    first_seconds: float = 1800.0
    idle_percent: float = 5.0
    idle_samples: int = 30
    idle_seconds: float = 300.0
    hot: float | None = None
    cool: float = 5.0
    clean_lines: int = 20


# HBM of a 910 reports a fault above 95 °C; a GPU slows down from about 90.
HOT = {"npu": 90.0, "cuda": 90.0}


class Alerts:
    """Watches lines and samples; all methods may be called from any thread.

    Args:
        emit: takes a kind and a sentence; ``MultiSink.event``.
        limits: see there.
        clock: seconds that never step back.
        every: seconds between looks for silence.
    """

    def __init__(
        self,
        emit: Callable[[str, str], None],
        limits: Limits = Limits(),
        clock: Callable[[], float] = time.monotonic,
        every: float = 5.0,
    ):
        self.emit, self.limits, self.clock, self.every = emit, limits, clock, every
        self._lock = threading.Lock()
        self._begun = clock()
        self._last: float | None = None  # newest line
        self._step = 0
        self._intervals: deque[float] = deque(maxlen=50)
        self._skipped: float | None = None
        self._clean = limits.clean_lines
        self._stalled = False
        self._low: dict[Chip, tuple[int, float]] = {}  # samples in a row, time of the first
        self._idle = False
        self._sick: set[Chip] = set()
        self._hot: set[Chip] = set()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Alerts:
        self._begun = self.clock()
        self._thread = threading.Thread(target=self._watch, name="alerts", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _watch(self) -> None:
        while not self._end.wait(self.every):
            self.look()

    # -- lines of metrics ----------------------------------------------------------------------------------------------

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A logged line: of training where it has a step's time, else of an evaluation."""
        with self._lock:
            now, before = self.clock(), self._last
            self._step, self._last, self._stalled = step, now, False
            if "perf/step_time" in values and before is not None:
                self._intervals.append(now - before)
            told = self._fault(step, values)
        self._tell(told)

    def _fault(self, step: int, values: Mapping[str, float]) -> list[tuple[str, str]]:
        skipped, before = values.get("train/skipped_steps"), self._skipped
        self._skipped = skipped if skipped is not None else before
        wrong = [k for k in ("train/loss", "train/grad_norm") if not math.isfinite(values.get(k, 0.0))]
        dropped = (skipped or 0.0) - before if skipped is not None and before is not None else 0.0
        if not wrong and dropped <= 0:
            self._clean += 1
            return []
        news, self._clean = self._clean >= self.limits.clean_lines, 0
        what = f"{' and '.join(wrong)} not finite" if wrong else f"{dropped:g} steps dropped as not finite"
        return [("alert_nan", f"Step {step}: {what}; see the data of these steps, or lower optim.lr.")] * news

    def look(self) -> None:
        """Whether there has been no line for too long."""
        with self._lock:
            now, limits = self.clock(), self.limits
            usual = median(self._intervals) if self._intervals else None
            since = now - (self._last if self._last is not None else self._begun)
            allowed = max(limits.stall_times * usual, limits.stall_seconds) if usual else limits.first_seconds
            if self._stalled or since <= allowed:
                return
            self._stalled = True
            where = f"since step {self._step}" if self._last is not None else "since the start"
            rhythm = f" (usually every {usual:.3g} s)" if usual else ""
        self._tell(
            [
                (
                    "alert_stall",
                    f"No line {where} for {since / 60:.0f} min{rhythm}: see the ends of logs/rank-*.log.",
                )
            ]
        )

    # -- samples of chips ----------------------------------------------------------------------------------------------

    def chips(self, rows: Rows) -> None:
        """The newest row of every node."""
        with self._lock:
            chips = {(node, chip["index"]): chip for node, row in rows.items() for chip in row["chips"]}
            now = max((row["time"] for row in rows.values()), default=0.0)
            told = [*self._idleness(chips, now), *self._health(chips), *self._heat(chips)]
        self._tell(told)

    def _idleness(self, chips: Mapping[Chip, Mapping[str, Any]], now: float) -> list[tuple[str, str]]:
        limits = self.limits
        if self._last is None or self._stalled:  # nothing runs yet, or that is the news
            self._low.clear()
            return []
        for key, chip in chips.items():
            util = chip.get("util")
            if util is not None and util >= limits.idle_percent:
                self._low.pop(key, None)
            elif util is not None:
                samples, begun = self._low.get(key, (0, now))
                self._low[key] = (samples + 1, begun)
        # Rounds of samples may leave the trainer's chips without work for minutes.
        enough = max(limits.idle_seconds, 3 * median(self._intervals) if self._intervals else 0.0)
        idle = [key for key, (n, t) in self._low.items() if n >= limits.idle_samples and now - t >= enough]
        news, self._idle = bool(idle) and not self._idle, bool(idle)
        text = (
            f"{len(idle)} of {len(chips)} chips below {limits.idle_percent:g} % for {enough / 60:.0f} min: "
        )
        return [("alert_idle", f"{text}{_names(idle)}.")] * news

    def _health(self, chips: Mapping[Chip, Mapping[str, Any]]) -> list[tuple[str, str]]:
        sick = {key: chip for key, chip in chips.items() if unhealthy(chip)}
        news = sorted(set(sick) - self._sick)
        self._sick = (self._sick - set(chips)) | set(sick)
        if not news:
            return []
        said = ", ".join(sorted({str(sick[key].get("health")) for key in news}))
        return [
            (
                "alert_unhealthy",
                f"{len(news)} chips report {said}: {_names(news)}; exclude them when you resume.",
            )
        ]

    def _heat(self, chips: Mapping[Chip, Mapping[str, Any]]) -> list[tuple[str, str]]:
        hot, cool = self.limits.hot, self.limits.cool
        if hot is None:
            return []
        temperatures = {key: chip["temp"] for key, chip in chips.items() if chip.get("temp") is not None}
        news = sorted(key for key, temp in temperatures.items() if temp >= hot and key not in self._hot)
        self._hot = {key for key in self._hot | set(news) if temperatures.get(key, hot) > hot - cool}
        if not news:
            return []
        worst = max(temperatures[key] for key in news)
        return [("alert_hot", f"{len(news)} chips at {hot:g} °C or more, up to {worst:g}: {_names(news)}.")]

    def _tell(self, told: Iterable[tuple[str, str]]) -> None:
        for kind, message in told:
            if not self._end.is_set():  # a sample that was under way when the run ended
                self.emit(kind, message)


def _names(chips: Iterable[Chip]) -> str:
    """``node 0: 1, 2; node 3: 0``, the first few."""
    chips = sorted(chips)
    by_node: dict[int, list[str]] = {}
    for node, index in chips[:SHOWN]:
        by_node.setdefault(node, []).append(str(index))
    shown = "; ".join(f"node {node}: {', '.join(indices)}" for node, indices in by_node.items())
    return shown + (f" and {len(chips) - SHOWN} more" if len(chips) > SHOWN else "")
