"""Waiting for the end of a run: a bar, and what a run that ended badly said last."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from lab_utils.errors import RunError
from lab_utils.runs.states import FINAL, JobState
from lab_utils.telemetry.console import Progress
from lab_utils.telemetry.jsonl import Tail

if TYPE_CHECKING:
    from lab_utils.runs.api import Run

POLL_SECONDS = 0.5
# Between a worker's "succeeded" and the end of its job lie the closing of sinks and processes.
CLOSING_SECONDS = 60.0


def wait_for(run: Run, timeout: float | None, progress: bool) -> Run:
    """See ``Run.wait``."""
    began = time.monotonic()
    tail = Tail(run.path / "metrics.jsonl")
    total = run.directory.status.get("total_steps") or 0
    bar = Progress(total, run.name, every=15.0) if progress else None
    ended: float | None = None
    try:
        while True:
            status = run.status
            if bar is not None:
                values = {k: v for row in tail.rows() for k, v in row.items() if k not in ("step", "time")}
                bar.update(int(status["step"] or 0), values, status["state"])
            if status["state"] in FINAL:
                ended = ended or time.monotonic()
                closing = run.launcher.status(run.directory) in (JobState.RUNNING, JobState.PENDING)
                if not closing or time.monotonic() - ended > CLOSING_SECONDS:
                    break
            else:
                ended = None  # a scheduler took the nodes: what had stopped is queued again
            if timeout is not None and time.monotonic() - began > timeout:
                raise RunError(
                    f"{run.name} is still {status['state']} at step {status['step']} after "
                    f"{timeout:g} s: it goes on; wait again, or stop it with lab runs stop {run.name}."
                )
            time.sleep(POLL_SECONDS)
    finally:
        if bar is not None:
            bar.close()
    status = run.status  # the supervisor may have found a better reason since
    if status["state"] in ("failed", "lost"):
        if progress:
            print(_last_lines(run, status), file=sys.stderr)
        how = "was lost" if status["state"] == "lost" else status["state"]
        raise RunError(f"{run.name} {how}: {status['error'] or 'see its logs'}")
    return run


def _last_lines(run: Run, status: dict[str, Any]) -> str:
    rank = status.get("failed_rank")
    text = run.logs(20, rank if rank is not None else 0) or run.logs(20)
    return f"--- end of the log ({run.path / 'logs'})\n{text}\n---"
