"""One timer for everything in this kernel that looks at files again and again.

    handle = subscribe(view.look, every=1.0)
    handle.cancel()

One daemon thread calls all subscribers in turn, and ends when there are none. What is called only reads files and sets
traits, and is soon done. An error ends up in ``handle.error`` and is the subscriber's to show; the others go on. Of a
bound method only a weak reference is kept: a view that nobody holds is dropped.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

Callback = Callable[[], object]


@dataclass
class Spent:
    """How long a subscriber's calls took, in seconds of the wall clock and of the processor; the newest one by one."""

    calls: int = 0
    total: float = 0.0
    longest: float = 0.0
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=2000))

    def add(self, seconds: float, processor: float) -> None:
        self.calls += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)
        self.recent.append((seconds, processor))


class Handle:
    """A subscription.

    Attributes:
        error: what the last call raised; None after one that went well.
        spent: time of all calls.
    """

    def __init__(self, callback: Callback, every: float):
        method = hasattr(callback, "__self__") and hasattr(callback, "__func__")
        self._callback: Callable[[], Callback | None] = (
            weakref.WeakMethod(callback) if method else lambda: callback
        )
        self.every, self.due = every, time.monotonic()
        self.error: Exception | None = None
        self.spent = Spent()
        self.cancelled = self._hurry = False

    @property
    def alive(self) -> bool:
        """Whether it will be called again."""
        return not self.cancelled and self._callback() is not None

    def cancel(self) -> None:
        """No more calls; one that is under way in the timer's thread goes to its end."""
        self.cancelled = True
        _pulse.wake()

    def soon(self) -> None:
        """The next call at once: there is more to do."""
        self.due, self._hurry = time.monotonic(), True
        _pulse.wake()

    def call(self) -> None:
        """Call now, in this thread."""
        callback = self._callback()
        if callback is None or self.cancelled:
            return
        began, worked, self._hurry = time.monotonic(), time.thread_time(), False
        try:
            callback()
            self.error = None
        except Exception as error:
            self.error = error
        ended = time.monotonic()
        self.spent.add(ended - began, time.thread_time() - worked)
        if not self._hurry:  # a slow one must not keep the thread busy
            self.due = max(began + self.every, ended + self.every / 2)


class _Pulse:
    """The thread and its subscribers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._handles: list[Handle] = []
        self._thread: threading.Thread | None = None

    def add(self, handle: Handle) -> None:
        with self._changed:
            self._handles.append(handle)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ascent-pulse", daemon=True)
                self._thread.start()
            self._changed.notify()

    def wake(self) -> None:
        if threading.current_thread() is not self._thread:
            with self._changed:
                self._changed.notify()

    def _run(self) -> None:
        while (handle := self._next()) is not None:
            handle.call()
            del handle  # a waiting thread must not keep a view alive

    def _next(self) -> Handle | None:
        """The handle that is due, when it is; None where there is no other left."""
        with self._changed:
            while True:
                self._handles = [handle for handle in self._handles if handle.alive]
                if not self._handles:
                    self._thread = None
                    return None
                first = min(self._handles, key=lambda handle: handle.due)
                pause = first.due - time.monotonic()
                if pause <= 0:
                    return first
                self._changed.wait(min(pause, 5.0))  # now and then see who was dropped


_pulse = _Pulse()


def subscribe(callback: Callback, every: float) -> Handle:
    """Call ``callback`` every so many seconds, from now on, in the timer's thread.

    Args:
        callback: a bound method is held weakly, anything else is kept until it is cancelled.
        every: seconds between the starts of two calls.
    """
    handle = Handle(callback, every)
    _pulse.add(handle)
    return handle
