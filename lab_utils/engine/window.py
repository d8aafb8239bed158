"""What the steps of one logged line add up to, over steps and ranks, and the rates that follow from it."""

from __future__ import annotations

import torch

from lab_utils.accelerators import Memory
from lab_utils.engine.reduce import over_ranks
from lab_utils.telemetry.reductions import Max, Metric, Sum, reduce_metrics, to_values

GIB = 2**30


class Window:
    """The steps since the last logged line; every rank adds its own and closes together with the others.

    Args:
        device: where the reduction over ranks works.
        world: number of ranks.
        peak_flops: FLOP/s of one chip, 0 or None where no rate is published for it; rank 0's counts.
    """

    def __init__(self, device: torch.device, world: int, peak_flops: float | None) -> None:
        self.device, self.world, self.peak_flops = device, world, peak_flops
        self._steps: list[dict[str, Metric]] = []

    def add(
        self, metrics: dict[str, Metric], *, tokens: float, positions: int, flops: float, memory: Memory
    ) -> None:
        """One step of this rank.

        Args:
            metrics: the step's own.
            tokens: non-padding tokens of the global batch.
            positions: tokens of this rank with padding.
            flops: model FLOPs of this rank.
            memory: of this rank's device.
        """
        self._steps.append(
            {
                **metrics,
                "tokens": Sum(tokens / self.world),
                "positions": Sum(float(positions)),
                "flops": Sum(flops),
                "mem/allocated_peak": Max(memory.allocated_peak / GIB),
                "mem/reserved_peak": Max(memory.reserved_peak / GIB),
                "mem/alloc_retries": Max(float(memory.alloc_retries)),
                "mem/peak_frac": Max(memory.reserved_peak / memory.capacity if memory.capacity else 0.0),
            }
        )

    def close(self) -> dict[str, float]:
        """Values of the line, over all ranks; the window is empty again."""
        steps, self._steps = self._steps, []
        values = to_values(over_ranks(reduce_metrics(steps), self.device))
        tokens, positions, flops = (values.pop(key) for key in ("tokens", "positions", "flops"))
        seconds = values["perf/step_time"] * len(steps)
        values |= {
            "perf/tokens_per_s": tokens / seconds,
            "perf/tokens_per_s_per_chip": tokens / seconds / self.world,
            "perf/tflops_per_chip": flops / seconds / self.world / 1e12,
            "perf/padding_frac": 1.0 - tokens / positions,
        }
        # Unknown for a device without a published rate: no number is better than a wrong one.
        if self.peak_flops:
            values["perf/mfu"] = flops / seconds / self.world / self.peak_flops
        return values
