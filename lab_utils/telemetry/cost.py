"""What watching the chips costs a training process: measured, since it runs in a thread of it.

The sampler's thread can take no more from training than its own CPU time, all of which may hold the interpreter; the
processes that it starts (npu-smi) take cores, not the interpreter. Both are measured, and the longest pause that a busy
main thread sees while samples are taken, beside the longest that it sees without any.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from lab_utils.registry import load
from lab_utils.telemetry import chip_log
from lab_utils.telemetry.chips import PROBES, ChipSampler, Probe, count

KINDS = ("npu", "cuda", "cpu")  # the first that is here


def measure(
    accelerator: str = "auto",
    *,
    samples: int = 20,
    interval: float = 2.0,
    nodes: int = 1,
    probe: Probe | None = None,
) -> dict[str, Any]:
    """The cost of a sample on this machine.

    Args:
        accelerator: ``cpu``, ``cuda``, ``npu``; ``auto``: what is here.
        samples: how many are taken, one right after the other.
        interval: seconds between samples of a run, which the shares are of; a slow probe raises it.
        nodes: of the run; the others' files are copies on this machine's disk, where a cluster has a shared one.
        probe: instead of the accelerator's own.

    Returns:
        ``wall_ms`` and ``cpu_ms`` of a sample, ``children_cpu_ms`` of the processes that it starts, ``bytes`` of its
        row, ``mib_a_day``, ``share``: of the interpreter's time at ``interval``, ``pause_ms``, ``pause_without_ms``.
    """
    kind = next(k for k in KINDS if count(k)) if accelerator == "auto" else accelerator
    with tempfile.TemporaryDirectory(prefix="ascent-chips-") as folder:
        sampler = ChipSampler(kind, interval, folder, probe=probe or load(PROBES, kind).make(None))
        sampler.sample()
        own = chip_log.node_file(folder, 0)
        for other in range(1, nodes):
            shutil.copy(own, chip_log.node_file(folder, other))
        size = own.stat().st_size

        def take() -> None:
            for _ in range(samples):
                sampler.sample()

        wall, cpu, children = time.perf_counter(), time.thread_time(), _children()
        take()
        wall, cpu, children = time.perf_counter() - wall, time.thread_time() - cpu, _children() - children
        row = (own.stat().st_size - size) / samples
        pause, without = _longest_pause(take), _longest_pause(lambda: time.sleep(wall))
        chips = len((chip_log.newest_row(own) or {}).get("chips", ()))
    return {
        "accelerator": kind,
        "chips": chips,
        "nodes": nodes,
        "samples": samples,
        "interval_s": sampler.interval,
        "wall_ms": 1e3 * wall / samples,
        "cpu_ms": 1e3 * cpu / samples,
        "children_cpu_ms": 1e3 * children / samples,
        "bytes": row,
        "mib_a_day": row * 86400 / sampler.interval / 2**20,
        "share": cpu / samples / sampler.interval,
        "pause_ms": 1e3 * pause,
        "pause_without_ms": 1e3 * without,
    }


def _children() -> float:
    """CPU seconds of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _longest_pause(work: Callable[[], None]) -> float:
    """Longest time in seconds in which a busy main thread doesn't get on, while ``work`` runs in another."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest
