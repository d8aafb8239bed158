"""Requests to stop, from a signal or from ``control.json``, heard between steps and agreed among the ranks."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from enum import IntEnum
from typing import Any


class Stop(IntEnum):
    """What is asked for; the stronger request wins where several are made."""

    NO = 0
    NOW = 1
    AFTER_CHECKPOINT = 2


ACTIONS = {"stop": Stop.NOW, "checkpoint_and_stop": Stop.AFTER_CHECKPOINT}


class StopRequests:
    """Listens for SIGTERM and SIGUSR1 (a scheduler's warning: save and stop), and reads the run's control file."""

    def __init__(self, run_dir: Any | None) -> None:
        self._run_dir = run_dir
        self._signalled = Stop.NO

    @contextmanager
    def listening(self):
        """Take the two signals for the time of training, where this is the main thread (a notebook's is not)."""
        kept = {}
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                kept[number] = signal.signal(number, self._hear)
        except ValueError:
            pass
        try:
            yield self
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        self._signalled = Stop.AFTER_CHECKPOINT

    def pending(self) -> Stop:
        """What this rank has been asked; a control file that cannot be read asks for nothing."""
        if self._signalled or self._run_dir is None:
            return self._signalled
        control = self._run_dir.control or {}
        return ACTIONS.get(control.get("action"), Stop.NO)
