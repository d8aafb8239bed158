"""Where a step's wall time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lab_utils.telemetry.reductions import Mean

PARTS = ("data", "generate", "weight_sync", "forward_backward", "optimizer", "checkpoint")


class StepClock:
    """Times of the parts of one step; what no part claims is ``other``.

    A checkpoint is made when its step has been logged: the wait for it counts to the step that follows.

    Args:
        synchronize: waits for the device, so that a part's time holds the work that it queued.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._parts, self._within = dict.fromkeys(PARTS, 0.0), 0.0
        self.restart()

    def restart(self) -> None:
        waited = self._parts["checkpoint"]
        self._begun = time.perf_counter() - waited
        self._parts = dict.fromkeys(PARTS, 0.0) | {"checkpoint": waited}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Of parts within one another, time counts to the innermost."""
        start, around = time.perf_counter(), self._within
        self._within = 0.0
        yield
        self._synchronize()
        took = time.perf_counter() - start
        self._parts[name] += took - self._within
        self._within = around + took

    def metrics(self) -> dict[str, Mean]:
        """``perf/step_time`` and its parts, in seconds, as means over steps and ranks."""
        whole = time.perf_counter() - self._begun
        parts = {**self._parts, "other": whole - sum(self._parts.values())}
        self._parts["checkpoint"] = 0.0  # told; what is added from here on is the next step's
        return {"perf/step_time": Mean(whole, 1), **{f"perf/time/{k}": Mean(v, 1) for k, v in parts.items()}}
