"""Where a run stands, in words: state, place in the queue, progress, time left, what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any, Generic, TypeVar

from lab_utils.launchers._base import JobInfo
from lab_utils.runs.api import Run
from lab_utils.runs.directory import default_root
from lab_utils.runs.follow import Follower
from lab_utils.runs.states import FINAL, JobState
from lab_utils.runs.waiting import CLOSING_SECONDS
from lab_utils.telemetry.wandb import ADDRESS, run_id
from lab_utils.widgets._words import badge, number, span, text

T = TypeVar("T")
SOFT = "color:var(--jp-ui-font-color2,#616e7c)"
BAD = "color:var(--jp-error-color0,#c62828)"
ERRORS = 3  # that are not folded away


class Asker(Generic[T]):
    """A question that may take seconds, as to a scheduler: asked in a thread of its own, the last answer kept."""

    def __init__(self, question: Callable[[], T]):
        self._question, self._thread, self._asked = question, None, -1e9
        self.answer: T | None = None
        self.error: Exception | None = None

    def ask(self, every: float) -> None:
        """Ask again if the last time is so many seconds ago and nothing is under way. Returns at once."""
        if self._thread is None and time.monotonic() - self._asked >= every:
            self._thread = Thread(target=self._run, name="ascent-asker", daemon=True)
            self._thread.start()

    def wait(self, timeout: float | None = None) -> T | None:
        """The answer of a question asked now; the one before, if that takes longer than ``timeout`` seconds."""
        self.ask(0.0)
        if (thread := self._thread) is not None:
            thread.join(timeout)
        return self.answer

    def forget(self) -> None:
        """The next question is asked at once: something has been done."""
        self._asked = -1e9

    def _run(self) -> None:
        try:
            self.answer, self.error = self._question(), None
        except Exception as error:
            self.error = error
        self._asked, self._thread = time.monotonic(), None


@dataclass(frozen=True)
class Told:
    """What the launcher said, and of which status."""

    stored: str | None  # state in status.json when it was asked
    status: dict[str, Any]
    job: JobInfo


def ask_launcher(run: Run) -> Told:
    """State as a reader should see it, and the job; may take as long as a scheduler takes."""
    stored = run.directory.status.get("state")
    return Told(stored, run.status, run.job())


@dataclass(frozen=True)
class Standing:
    """A run at a moment.

    Attributes:
        state: as in ``runs/states.py``.
        step, total: optimizer steps.
        error: why it ended, a sentence.
        details: phrases: the queue, time left, restarts.
        over: whether nothing will happen any more.
    """

    state: str
    step: int
    total: int
    error: str
    details: tuple[str, ...]
    over: bool


def standing(follower: Follower, told: Told | None, now: float | None = None) -> Standing:
    """What status.json, the metrics and the launcher's last answer say together."""
    now = time.time() if now is None else now
    status = follower.status
    stored = status.get("state")
    current = told if told is not None and told.stored == stored else None
    state = stored or "lost"
    error = status.get("error")
    if current is not None and stored not in FINAL:
        state, error = current.status["state"], current.status.get("error")
    job = current.job if current else None
    total = int(status.get("total_steps") or 0)
    step = int(status.get("step") or 0)
    if state == "running":
        step = max(step, follower.series.newest)
    quiet = now - (status.get("heartbeat") or 0.0) > CLOSING_SECONDS
    gone = job is not None and job.state in (JobState.GONE, JobState.UNKNOWN)
    return Standing(
        state,
        min(step, total) if total else step,
        total,
        str(error or ""),
        tuple(_details(state, follower, job, now)),
        over=(stored in FINAL and (quiet or gone)) or (state == "lost" and current is not None),
    )


def _details(state: str, follower: Follower, job: JobInfo | None, now: float):
    status = follower.status
    if state == "queued":
        place = f"place {job.position} in the queue" if job and job.position else "waits for its place"
        yield f"{place}: {job.detail}" if job and job.detail else place
        if status.get("created"):
            yield f"since {span(now - status['created'])}"
    if state in ("running", "stopping"):
        left = follower.seconds_left()
        if left is not None and state == "running":
            yield f"{span(left)} left"
        if status.get("started"):
            yield f"{span(now - status['started'])} so far"
        if job and job.seconds_left is not None:
            yield f"{span(job.seconds_left)} to the job's time limit"
        if job and len(job.nodes) > 1:
            yield f"{len(job.nodes)} nodes"
    if state in FINAL and status.get("finished") and status.get("started"):
        yield f"took {span(status['finished'] - status['started'])}"
        yield f"ended {span(now - status['finished'])} ago"
    restarts = (job.restarts if job else 0) or status.get("restarts") or 0
    if restarts:
        yield f"restarted {restarts} time{'s' if restarts > 1 else ''} by its scheduler"


HEADLINE = (
    ("loss", "train/loss", 1.0, ""),
    ("eval loss", "eval/loss", 1.0, ""),
    ("tokens/s", "perf/tokens_per_s", 1.0, ""),
    ("MFU", "perf/mfu", 100.0, " %"),
)


def headline(latest: dict[str, float]) -> list[tuple[str, str]]:
    """The newest values that everybody asks for first."""
    return [(name, f"{number(latest[k] * scale)}{unit}") for name, k, scale, unit in HEADLINE if k in latest]


def head(name: str, at: Standing, latest: dict[str, float]) -> str:
    """All of it as HTML."""
    share = at.step / at.total if at.total else 0.0
    bar = (
        '<div style="height:4px;background:var(--jp-layout-color3,#ddd);margin:5px 0 1px"><div style="height:100%;'
        f'width:{100 * share:.1f}%;background:var(--jp-brand-color1,#1976d2)"></div></div>'
    )
    steps = f"step {at.step:,} of {at.total:,}" if at.total else f"step {at.step:,}"
    values = "".join(
        f'<span style="margin-left:16px"><span style="{SOFT}">{text(label)}</span> <b>{text(value)}</b></span>'
        for label, value in headline(latest)
    )
    details = text(" · ".join((steps, *at.details)))
    error = (
        f'<div style="{BAD}">{text(at.error)}</div>' if at.error and at.state in ("failed", "lost") else ""
    )
    return (
        f'<div style="font-variant-numeric:tabular-nums">{badge(at.state)} <b style="margin-left:6px">{text(name)}</b>'
        f'{values}{bar}<span style="{SOFT}">{details}</span>{error}</div>'
    )


def error_rows(follower: Follower) -> list[dict[str, str]]:
    """Alerts of the run and lines that look like errors, the newest first."""
    alerts = [
        {"where": "alert", "text": str(row.get("message")), "advice": ""}
        for row in follower.events
        if str(row.get("kind")).startswith("alert_")
    ][-4:]
    found = []
    for error in follower.logs.errors.values():
        others = len(error.files) - 1
        more = f" and {others} more" if others > 0 else ""
        times = f" ×{error.count}" if error.count > len(error.files) else ""
        where = f"{error.file.removesuffix('.log')}{more}{times}"
        found.append({"where": where, "text": error.text, "advice": error.advice})
    return [*reversed(alerts), *reversed(found)]


def errors_html(rows: list[dict[str, str]]) -> str:
    """``error_rows`` as HTML."""
    parts = []
    for row in rows:
        advice = f'<div class="lab-advice">{text(row["advice"])}</div>' if row["advice"] else ""
        where = f'<span class="lab-where" style="{SOFT}">{text(row["where"])}</span>'
        parts.append(f'<div class="lab-error" style="{BAD}">{where} {text(row["text"])}{advice}</div>')
    rest = len(parts) - ERRORS
    if rest > 0:
        folded = f'<summary style="{SOFT};cursor:pointer">{rest} more</summary>{"".join(parts[ERRORS:])}'
        parts[ERRORS:] = [f"<details>{folded}</details>"]
    return "".join(parts)


def waiting_for(at: Standing) -> str:
    """What an empty chart waits for."""
    if at.over or at.state in FINAL:
        return "Nothing was logged in this run."
    if at.state in ("created", "queued"):
        return "Begins when the job has its place\nand the first step is done."
    return "Begins with the first step:\nranks start and the model is loaded."


def wandb_place(run: Run) -> tuple[str | None, str]:
    """Where W&B shows the run: an address, or None; and a sentence."""
    tracking = run.recipe.tracking
    if tracking.wandb == "disabled":
        return None, "tracking.wandb is disabled: this run has no W&B data; metrics.jsonl has every value."
    if tracking.wandb == "offline":
        known = run.path.parent == default_root().resolve()
        server = "" if tracking.base_url else " --url https://SERVER"
        command = f"lab wandb sync {run.name if known else run.path}{server}"
        return None, f"Its W&B data is in the run's own folder. To bring it to a server: {command}"
    base = str(tracking.base_url).rstrip("/")
    if (told := run.path / ADDRESS).exists():
        return told.read_text(encoding="utf-8").strip(), f"Run {run.name}."
    if not tracking.entity:  # the server knows it, and says so as the run begins
        return base, f"Project {tracking.project}, run {run.name}."
    number_ = run_id(f"{run.name}/node-0")
    return f"{base}/{tracking.entity}/{tracking.project}/runs/{number_}", f"Run {run.name}."
