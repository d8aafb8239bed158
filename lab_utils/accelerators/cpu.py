"""The CPU as a device: laptops, CI, and every test. Its peak is measured once and kept on disk."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lab_utils.accelerators import Accelerator, Memory, Peak

if TYPE_CHECKING:
    import torch

MATRIX = 1024  # edge of the measured product: large enough for the rate to be flat
MEASURE_S = 1.0  # the fastest product of this long: a clock that has sped up, a neighbour that has paused


class Cpu(Accelerator):
    name = "cpu"
    backend = "gloo"

    @classmethod
    def available(cls) -> bool:
        return True

    def setup(self, local_rank: int = 0, threads: int | None = None, local_world: int = 1) -> torch.device:
        """Without ``threads`` the cores that this process may use are shared evenly among the ranks of the machine."""
        import torch

        torch.set_num_threads(threads or max(1, _cores() // local_world))
        keep_freed_memory()
        return torch.device("cpu")

    def device_name(self) -> str:
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            return platform.processor() or platform.machine()

    def peak(self, dtype: str) -> Peak:
        import torch

        threads = torch.get_num_threads()
        key = f"{dtype}/threads={threads}"
        path = cache_dir() / f"peak-{self._fingerprint()}.json"
        known = _read_json(path)
        if key not in known:
            known = {**_read_json(path), key: measure_matmul(dtype)}
            _write_json(path, known)
        return Peak(known[key], f"measured {MATRIX}×{MATRIX} matrix product, {dtype}, {threads} threads")

    def memory(self) -> Memory:
        import psutil

        peak = _peak_resident()
        return Memory(allocated_peak=peak, reserved_peak=peak, capacity=psutil.virtual_memory().total)

    def reset_memory_peak(self) -> None:
        """Linux can forget the peak of a process; elsewhere it stays that of the whole life of the process."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def synchronize(self) -> None:
        """CPU work is done when a call returns."""

    def _fingerprint(self) -> str:
        import torch

        from kernels._products import onednn_first

        facts = f"{platform.node()}|{self.device_name()}|{_cores()}|{torch.__version__}|{platform.machine()}"
        facts += f"|{'onednn' if onednn_first() else 'blas'}"
        return hashlib.sha256(facts.encode()).hexdigest()[:12]


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed for the next step; whether it did.

    By default it hands large blocks back to the system and faults them in again, zeroed, in every step: up to a fifth
    of a step's time. Other C libraries are left as they are.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def measure_matmul(dtype: str, edge: int = MATRIX, seconds: float = MEASURE_S) -> float:
    """FLOP/s of the fastest square matrix product within some seconds, at the present number of threads, by the library
    that the kernels use."""
    import torch

    from kernels._products import mm

    with torch.no_grad():
        a = torch.randn(edge, edge).to(getattr(torch, dtype))
        b = torch.randn(edge, edge).to(getattr(torch, dtype))
        best, end = float("inf"), time.perf_counter() + seconds
        while (start := time.perf_counter()) < end or best == float("inf"):
            mm(a, b)
            best = min(best, time.perf_counter() - start)
    return 2.0 * edge**3 / best


def cache_dir() -> Path:
    """Where measurements of this machine are kept: ``ASCENT_CACHE``, else ``~/.cache/ascent``."""
    return Path(os.environ.get("ASCENT_CACHE") or Path.home() / ".cache" / "ascent")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _peak_resident() -> int:
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _read_json(path: Path) -> dict[str, float]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, values: dict[str, float]) -> None:
    """By rename; a cache that cannot be written is measured again next time, which is no reason to stop."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(values, file)
        os.replace(file.name, path)
    except OSError:
        pass


ACCELERATOR = Cpu
