"""Where metrics go: metrics.jsonl always, W&B and the console beside it. A sink that fails never stops a run.

The engine makes one ``MultiSink`` on the first rank of a node and talks to nothing else::

    sinks = make_sinks(recipe)
    sinks.open(run_dir, recipe, provenance)
    sinks.log(step, {"train/loss": 1.2})
    sinks.close("succeeded")
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lab_utils.telemetry.console import ConsoleSink
from lab_utils.telemetry.jsonl import JsonlSink

if TYPE_CHECKING:
    from lab_utils.recipe import Recipe


class Sink(Protocol):
    """What a destination of metrics does. Any method may raise: ``MultiSink`` then goes on without it."""

    def open(self, run_dir: Path, recipe: Recipe, provenance: dict[str, Any]) -> None:
        """Start, or go on where an earlier attempt of the same run stopped."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers of one optimizer step; a step may come in several calls (training, then evaluation)."""
        ...

    def event(self, kind: str, message: str) -> None:
        """Something worth a line: a checkpoint, a skipped step, a warning."""
        ...

    def close(self, state: str) -> None:
        """The end of the run in this process, with the state that it ended in."""
        ...


class MultiSink:
    """Several sinks as one. A sink that raises is dropped with one warning, and the others hear of it.

    May be called from several threads: alerts come from beside the loop.

    Args:
        sinks: in the order in which they are called; the first is the record, usually ``JsonlSink``.
    """

    def __init__(self, sinks: Sequence[Sink]):
        self.sinks = list(sinks)
        self.dropped: list[str] = []
        self._lock = threading.RLock()

    def _each(self, method: str, *arguments: Any) -> None:
        with self._lock:
            for sink in list(self.sinks):
                try:
                    getattr(sink, method)(*arguments)
                except Exception as error:
                    self._drop(sink, method, error)

    def _drop(self, sink: Sink, method: str, error: Exception) -> None:
        self.sinks.remove(sink)
        name = type(sink).__name__
        self.dropped.append(name)
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        warning = f"{name} failed in {method} and is off; the run goes on ({type(error).__name__}: {reason})"
        print(f"warning: {warning}", file=sys.stderr, flush=True)
        if method != "event":
            self._each("event", "sink_dropped", warning)

    def open(self, run_dir: Path, recipe: Recipe, provenance: dict[str, Any]) -> None:
        """``run_dir``: a path, or anything with a ``path`` (a RunDirectory)."""
        self._each("open", Path(getattr(run_dir, "path", run_dir)), recipe, provenance)

    def log(self, step: int, values: dict[str, float]) -> None:
        plain = {key: float(value) for key, value in values.items()}
        self._each("log", int(step), {"train/global_step": float(step), **plain})

    def event(self, kind: str, message: str) -> None:
        self._each("event", kind, message)

    def close(self, state: str) -> None:
        self._each("close", state)


def make_sinks(recipe: Recipe, *, console: bool = True, node: int = 0) -> MultiSink:
    """The sinks that ``recipe.tracking`` asks for; metrics.jsonl is always the first.

    A node other than the first has only its own W&B run, for its chips.
    """
    sinks: list[Sink] = [JsonlSink()] if node == 0 else []
    if recipe.tracking.wandb != "disabled":
        from lab_utils.telemetry.wandb import WandbSink

        sinks.append(WandbSink(node))
    if console and node == 0:
        sinks.append(ConsoleSink())
    return MultiSink(sinks)
