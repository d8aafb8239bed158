"""CPU: a "chip" is a rank with its share of the cores, and its use the CPU time of its processes."""

from __future__ import annotations

import os
import time

import psutil

from lab_utils.telemetry.chips import ChipReading

MIB = 2**20


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count() -> int:
    """A rank needs no device of its own: any number of ranks is possible, limited by cores."""
    return cores()


class CpuProbe:
    """Reads the ranks that were started beside this one (children of torchrun), or this process alone.

    Args:
        ranks: ranks on this node, each with an equal share of the cores.
    """

    min_interval = 0.1

    def __init__(self, ranks: int):
        self.share = max(cores() / ranks, 1.0)  # threads that one rank has to itself
        self._seen: dict[tuple[int, float], float] = {}
        self._last_time: float | None = None
        psutil.cpu_percent()

    def _ranks(self) -> list[psutil.Process]:
        own = psutil.Process()
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return [own]
        ranks = []
        for child in psutil.Process(os.getppid()).children():
            try:
                if "LOCAL_RANK" in child.environ():
                    ranks.append(child)
            except psutil.Error:
                continue
        return sorted(ranks, key=lambda p: p.pid) or [own]

    def read(self) -> list[ChipReading]:
        now = time.monotonic()
        elapsed = now - self._last_time if self._last_time is not None else None
        self._last_time = now
        memory = psutil.virtual_memory()
        host = psutil.cpu_percent()
        readings = []
        seen: dict[tuple[int, float], float] = {}
        for index, rank in enumerate(self._ranks()):
            spent = resident = 0.0
            for process in [rank, *_children(rank)]:
                try:
                    identity = (process.pid, process.create_time())
                    times = process.cpu_times()
                    resident += process.memory_info().rss / MIB
                except psutil.Error:
                    continue
                total = times.user + times.system
                # A process that wasn't there last time has spent all its time since.
                spent += total - self._seen.get(identity, 0.0)
                seen[identity] = total
            util = None
            if elapsed:
                util = min(100 * spent / elapsed / self.share, 100.0)
            readings.append(
                ChipReading(
                    index=index,
                    name=f"rank {index}",
                    util=util,
                    used_mib=(memory.total - memory.available) / MIB,
                    total_mib=memory.total / MIB,
                    temp=_hottest(),
                    more={"resident_mib": round(resident, 1), "host_percent": host},
                )
            )
        self._seen = seen
        return readings


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _hottest() -> float | None:
    """The hottest core, where the kernel says; virtual machines and containers mostly don't."""
    try:
        sensors = psutil.sensors_temperatures()
    except (AttributeError, OSError):
        return None
    temperatures = [
        s.current for name in ("coretemp", "k10temp", "cpu_thermal") for s in sensors.get(name, [])
    ]
    return max(temperatures, default=None)


def make(chips: int | None) -> CpuProbe:
    return CpuProbe(chips or int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
