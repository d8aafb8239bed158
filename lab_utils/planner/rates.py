"""How fast a device of a cluster does the work of ``work.py``, under assumptions."""

from __future__ import annotations

from lab_utils.planner import work
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import Case, Cluster


class Rates:
    """Seconds of products, operators and memory on a device, under assumptions."""

    def __init__(self, cluster: Cluster, assumed: Assumptions) -> None:
        device, found = cluster.device, cluster.efficiency
        self.cluster, self.assumed, case = cluster, assumed, assumed.case
        self.on_cpu = cluster.kind == "cpu"
        self.fused = assumed.kernels == "fused" and not self.on_cpu  # a CPU has the plain operators alone
        self._peak = device.tflops.value * 1e12
        self._working = self._peak
        if assumed.fp8 and device.tflops_fp8 is not None:
            self._working = device.tflops_fp8.value * 1e12
        self._fp32 = device.tflops_fp32.of(case) * 1e12
        self._curve, self._sustained = found.products, found.sustained.of(case)
        self.attention = found.attention.of(case) * self._peak
        self.bandwidth = device.bandwidth_tb_s.value * 1e12 * found.memory.of(case)
        self._caches = found.caches
        self._known: dict[work.Product, float] = {}

    def product(self, one: work.Product) -> float:
        """Forward seconds: by the size of the product, but not faster than its operands come from memory."""
        found = self._known.get(one)
        if found is None:
            edge = (one.rows * one.inner * one.outer) ** (1 / 3)
            # Of a device's matrix unit a tile, and all groups of a product in one call; a CPU takes them one by one.
            narrow = 1.0 if self.on_cpu else min(1.0, one.rows / 128, one.inner / 128, one.outer / 128)
            together = 1.0 if self.on_cpu else one.groups ** (1 / 3)
            share = self._curve.at(edge * together) * narrow * self._sustained
            working = one.precision == "working"
            rate = self._working * share if working else self._fp32 * narrow * self._sustained
            size = 2 if working and not self.on_cpu else 4
            operands = one.rows * one.inner + one.inner * one.outer + one.rows * one.outer
            read = one.groups * operands * size
            found = max(one.flops / rate, self.moving(read, read / 3))
            if working and self.assumed.fp8:  # operands are read in bf16, scaled and written in fp8
                cast = one.rows * one.inner + one.inner * one.outer
                found += 3.0 * one.groups * cast / self.bandwidth
            self._known[one] = found
        return found

    def moving(self, size: float, tensor: float) -> float:
        """Seconds that so many bytes take through memory, in tensors of ``tensor`` bytes each."""
        return size / (self.bandwidth * (self._caches.at(tensor) if self._caches and tensor else 1.0))


def other_end(case: Case) -> str:
    """Of waits, the low end is the good one."""
    return {"low": "high", "high": "low"}.get(case, "expected")
