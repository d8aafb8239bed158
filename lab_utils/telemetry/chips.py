"""Chips while a run trains: a thread of one rank a node writes chips/node-<k>.jsonl and gives the ``chip/`` metrics.

    sampler = ChipSampler("npu", interval=10, run_dir=path, chips=16, node=0)
    sampler.start()
    sampler.latest()     # {"chip/util_mean": 63.1, "chip/power": 301.5, ...}; {} before the first sample
    sampler.stop()

Node 0 reads the newest row of every other node from the shared directory, so that its metrics are those of all chips.
How a kind of chip is read is one file of ``telemetry/probes``. A probe that fails is asked again later, more and more
rarely; it never disturbs the run.

A thread, and not a process beside the rank: a sample costs about 1 ms of the interpreter (``lab chips cost``), the rest
is waiting for npu-smi, which is a process of its own; and a thread cannot be left behind when a rank is killed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lab_utils.registry import load
from lab_utils.telemetry import chip_log, jsonl

PROBES = "lab_utils.telemetry.probes"
# A sample older than this many intervals says nothing about now.
STALE_INTERVALS = 10
MAX_PAUSE = 300.0
HEALTHY = frozenset({"ok", "normal"})
UNSAID = frozenset({"", "-", "na", "unknown"})

Rows = Mapping[int, Mapping[str, Any]]  # newest row of each node


@dataclass(frozen=True)
class ChipReading:
    """One chip at one moment; None = this chip or driver doesn't say (never counted as 0).

    Attributes:
        index: device index as the training process counts it (910C: one per die).
        name: product name; on CPU the rank.
        util: use of the compute cores, 0–100.
        used_mib, total_mib: device memory as the driver sees it.
        power: watts; of a package where one die reports for both.
        temp: °C.
        tx, rx: GB/s on the interconnect.
        more: anything else that the probe knows, as ``health``; stands beside the others in the log.
    """

    index: int
    name: str = ""
    util: float | None = None
    used_mib: float | None = None
    total_mib: float | None = None
    power: float | None = None
    temp: float | None = None
    tx: float | None = None
    rx: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The chip in a row of the log: what is known, numbers to a hundredth."""
        known = {key: value for key, value in asdict(self).items() if value not in (None, "", {})}
        known |= known.pop("more", {})
        return {
            key: round(value, 2) if isinstance(value, float) else value
            for key, value in known.items()
            if value is not None
        }


class Probe(Protocol):
    """How chips are read; a module of ``telemetry/probes`` has ``make(chips) -> Probe``, ``count()``."""

    min_interval: float

    def read(self) -> list[ChipReading]:
        """The chips of this node that the run uses. May raise: the sampler waits and asks again."""
        ...


def count(accelerator: str) -> int:
    """Chips of a kind on this machine, without torch; 0 where there are none or no driver."""
    return load(PROBES, accelerator).count()


def unhealthy(chip: Mapping[str, Any]) -> bool:
    """Whether a chip says of itself that something is wrong; one that says nothing is not counted."""
    said = str(chip.get("health") or "").strip().lower()
    return said not in UNSAID and said not in HEALTHY


def aggregate(chips: Iterable[ChipReading | Mapping[str, Any]]) -> dict[str, float]:
    """The ``chip/`` metrics of one sample, of readings or of their rows. What no chip reports is left out."""
    rows = [chip.row() if isinstance(chip, ChipReading) else chip for chip in chips]

    def known(name: str) -> list[float]:
        return [value for row in rows if (value := row.get(name)) is not None]

    metrics: dict[str, float] = {}
    if util := known("util"):
        metrics["chip/util_mean"] = sum(util) / len(util)
        metrics["chip/util_min"] = min(util)
    filled = [r["used_mib"] / r["total_mib"] for r in rows if "used_mib" in r and r.get("total_mib")]
    if filled:
        metrics["chip/hbm_frac"] = max(filled)
    if power := known("power"):
        metrics["chip/power"] = sum(power) / len(power)
        metrics["chip/power_total"] = sum(power)
    if temp := known("temp"):
        metrics["chip/temp_max"] = max(temp)
    for name in ("tx", "rx"):
        if rate := known(name):
            metrics[f"chip/link_{name}"] = sum(rate) / len(rate)
    if any(str(row.get("health") or "").strip().lower() not in UNSAID for row in rows):
        metrics["chip/unhealthy"] = float(sum(map(unhealthy, rows)))
    return metrics


def joules_per_token(values: Mapping[str, float]) -> dict[str, float]:
    """``perf/joules_per_token`` of a logged line, from the power of all chips; {} where no power is known."""
    watts, speed = values.get("chip/power_total"), values.get("perf/tokens_per_s")
    return {"perf/joules_per_token": watts / speed} if watts and speed else {}


class ChipSampler:
    """Samples in a daemon thread and keeps the last aggregate.

    Args:
        accelerator: ``cpu``, ``cuda``, ``npu``: a member of ``telemetry/probes``.
        interval: seconds between samples; a probe that is slow by nature raises it (npu-smi: 10 s).
        run_dir: where ``chips/node-<k>.jsonl`` goes; None writes none.
        chips: chips of this node that the run uses; None = all that are visible.
        node: this node's number; node 0 gathers the others.
        probe: instead of the accelerator's own.
        listener: is given the newest row of every node after each sample, in the sampler's thread.
    """

    def __init__(
        self,
        accelerator: str,
        interval: float,
        run_dir: Path | str | None,
        *,
        chips: int | None = None,
        node: int = 0,
        probe: Probe | None = None,
        listener: Callable[[Rows], None] | None = None,
    ):
        self.accelerator, self.chips, self.node = accelerator, chips, node
        self.interval = interval
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.listener = listener
        self.failures = 0
        self._probe = probe
        self._meter: chip_log.Meter | None = None
        self._last: tuple[float, dict[str, float]] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> Path | None:
        return chip_log.node_file(self.run_dir, self.node) if self.run_dir is not None else None

    def start(self) -> ChipSampler:
        self._thread = threading.Thread(target=self._loop, name="chip-sampler", daemon=True)
        self._thread.start()
        return self

    def latest(self) -> dict[str, float]:
        """``chip/`` metrics of the last sample; {} where there is none that is still worth showing."""
        last = self._last
        if last is None or time.monotonic() - last[0] > self._stale():
            return {}
        return dict(last[1])

    def stop(self) -> None:
        """End the thread; returns within a second or two even where a probe hangs."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def __enter__(self) -> ChipSampler:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def sample(self) -> dict[str, float]:
        """One sample now, in the caller's thread. May raise whatever the probe raises."""
        if self._probe is None:
            self._probe = load(PROBES, self.accelerator).make(self.chips)
        self.interval = max(self.interval, self._probe.min_interval)
        chips = [reading.row() for reading in self._probe.read()]
        own = self._row(chips)
        if self.path is not None and chips:
            jsonl.append(self.path, own)
        rows: dict[int, Mapping[str, Any]] = {self.node: own}
        if self.node == 0 and self.run_dir is not None:
            rows |= {k: row for k, row in chip_log.newest(self.run_dir).items() if k != self.node}
        fresh = {k: row for k, row in rows.items() if own["time"] - row.get("time", 0.0) <= self._stale()}
        metrics = aggregate(chip for row in fresh.values() for chip in row.get("chips", ()))
        # What was spent stays spent, also by a node that is silent now.
        if joules := [row["joules"] for row in rows.values() if row.get("joules") is not None]:
            metrics["chip/energy_kwh"] = sum(joules) / chip_log.JOULES_PER_KWH
        self._last = (time.monotonic(), metrics)
        if self.listener is not None:
            self.listener(fresh)
        return metrics

    def _row(self, chips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """This node's row: time and power first, where a reader in a hurry finds them."""
        now, metrics = round(time.time(), 3), aggregate(chips)
        first = {"first": True} if self._meter is None else {}
        if self._meter is None:  # a resumed run goes on counting
            before = chip_log.newest_row(self.path) if self.path is not None else None
            self._meter = chip_log.Meter(spent=(before or {}).get("joules"))
        joules = self._meter.add(now, metrics.get("chip/power_total"), chip_log.GAP * self.interval)
        ordered = {"chip/power_total": metrics.get("chip/power_total"), "joules": joules, **metrics}
        rounded = {key: round(value, 3) for key, value in ordered.items() if value is not None}
        return {"time": now, **first, **rounded, "chips": chips}

    def _stale(self) -> float:
        return max(STALE_INTERVALS * self.interval, 60.0)

    def _loop(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                self.sample()
                self.failures = 0
            except Exception as error:  # a probe may meet anything: drivers, permissions, a full disk
                self.failures += 1
                if self.failures == 1:
                    print(
                        f"warning: {self.accelerator} chips cannot be read ({error}); the run goes on.",
                        file=sys.stderr,
                        flush=True,
                    )
            pause = min(self.interval * 2 ** min(self.failures, 10), max(MAX_PAUSE, self.interval))
            self._stop.wait(max(pause - (time.monotonic() - started), 0.05))
