"""Utilisation of the chips while a run trains: a thread beside training makes chips.jsonl and ``chip/``.

    sampler = ChipSampler("npu", interval=10, run_dir=path, chips=16)
    sampler.start()
    sampler.latest()     # {"chip/util_mean": 63.1, "chip/power": 301.5, ...}; {} before the first sample
    sampler.stop()

How a kind of chip is read is one file of ``telemetry/probes``. A probe that fails is asked again later, more
and more rarely; it never disturbs the run. On a node only rank 0 samples: reading eight NPUs takes 5 s of
npu-smi.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lab_utils.registry import load
from lab_utils.telemetry import jsonl

PROBES = "lab_utils.telemetry.probes"
# A sample older than this many intervals says nothing about now.
STALE_INTERVALS = 10
MAX_PAUSE = 300.0


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
        more: anything else that the probe knows, for chips.jsonl only.
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


class Probe(Protocol):
    """How chips are read; a module of ``telemetry/probes`` has ``make(chips) -> Probe``, ``count()``."""

    min_interval: float

    def read(self) -> list[ChipReading]:
        """The chips of this node that the run uses. May raise: the sampler waits and asks again."""
        ...


def count(accelerator: str) -> int:
    """Chips of a kind on this machine, without torch; 0 where there are none or no driver."""
    return load(PROBES, accelerator).count()


def aggregate(readings: Sequence[ChipReading]) -> dict[str, float]:
    """The ``chip/`` metrics of one sample. What no chip reports is left out."""

    def known(name: str) -> list[float]:
        return [value for r in readings if (value := getattr(r, name)) is not None]

    metrics: dict[str, float] = {}
    if util := known("util"):
        metrics["chip/util_mean"] = sum(util) / len(util)
        metrics["chip/util_min"] = min(util)
    if filled := [r.used_mib / r.total_mib for r in readings if r.used_mib is not None and r.total_mib]:
        metrics["chip/hbm_frac"] = max(filled)
    if power := known("power"):
        metrics["chip/power"] = sum(power) / len(power)
    if temp := known("temp"):
        metrics["chip/temp_max"] = max(temp)
    for name in ("tx", "rx"):
        if rate := known(name):
            metrics[f"chip/link_{name}"] = sum(rate) / len(rate)
    return metrics


class ChipSampler:
    """Samples in a daemon thread and keeps the last aggregate.

    Args:
        accelerator: ``cpu``, ``cuda``, ``npu``: a member of ``telemetry/probes``.
        interval: seconds between samples; a probe that is slow by nature raises it (npu-smi: 10 s).
        run_dir: where ``chips.jsonl`` goes; None writes none.
        chips: chips of this node that the run uses; None = all that are visible.
        probe: instead of the accelerator's own.
    """

    def __init__(
        self,
        accelerator: str,
        interval: float,
        run_dir: Path | str | None,
        *,
        chips: int | None = None,
        probe: Probe | None = None,
    ):
        self.accelerator, self.chips = accelerator, chips
        self.interval = interval
        self.path = Path(run_dir) / "chips.jsonl" if run_dir is not None else None
        self.failures = 0
        self._probe = probe
        self._last: tuple[float, dict[str, float]] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> ChipSampler:
        self._thread = threading.Thread(target=self._loop, name="chip-sampler", daemon=True)
        self._thread.start()
        return self

    def latest(self) -> dict[str, float]:
        """``chip/`` metrics of the last sample; {} where there is none that is still worth showing."""
        last = self._last
        if last is None or time.monotonic() - last[0] > max(STALE_INTERVALS * self.interval, 60.0):
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
        readings = self._probe.read()
        metrics = aggregate(readings)
        self._last = (time.monotonic(), metrics)
        if self.path is not None and readings:
            row = {"time": round(time.time(), 3), **metrics, "chips": [_compact(r) for r in readings]}
            jsonl.append(self.path, row)
        return metrics

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


def _compact(reading: ChipReading) -> dict[str, Any]:
    row = {key: value for key, value in asdict(reading).items() if value not in (None, "", {})}
    more = row.pop("more", {})
    return {**row, **more}
