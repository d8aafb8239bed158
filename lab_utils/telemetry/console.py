"""Progress for a person: a bar on a terminal, one output in a notebook, a line now and then in a log file.

``Progress`` serves the sink of a training process and everyone who watches a run from outside.
"""

from __future__ import annotations

import html
import sys
import time
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm


def in_notebook() -> bool:
    """Whether output goes to a Jupyter kernel; IPython is not imported to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def clock(seconds: float | None) -> str:
    """``75`` → ``01:15``; unknown → ``?``."""
    return "?" if seconds is None else tqdm.format_interval(seconds)


def describe(values: dict[str, float]) -> str:
    """The headline numbers of a step: ``loss 1.234 · eval 1.301 · 12.3k tokens/s · MFU 21%``."""
    parts = []
    for key, label in (("train/loss", "loss"), ("eval/loss", "eval")):
        if key in values:
            parts.append(f"{label} {float(values[key]):.4g}")
    if "perf/tokens_per_s" in values:
        parts.append(f"{tqdm.format_sizeof(float(values['perf/tokens_per_s']))} tokens/s")
    if "perf/mfu" in values:
        parts.append(f"MFU {100 * float(values['perf/mfu']):.0f}%")
    return " · ".join(parts)


class Progress:
    """Where a run stands, shown the way the place of output allows.

    Args:
        total: optimizer steps of the run.
        label: usually the run's name.
        stream: a text stream; standard error if absent.
        every: seconds between lines where there is no terminal and no notebook.
        mode: ``bar``, ``notebook`` or ``lines``; absent: found out.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        stream: IO[str] | None = None,
        every: float = 30.0,
        mode: str | None = None,
    ):
        self.total, self.label, self.every = total, label, every
        self.stream = stream or sys.stderr
        if mode is None:
            mode = "notebook" if in_notebook() else "bar" if self.stream.isatty() else "lines"
        self.mode = mode
        self.step = 0
        self.state = ""
        self._headline: dict[str, float] = {}
        self._began: tuple[int, float] | None = None
        self._shown = 0.0
        self._drawn: tuple[int, str] | None = None
        self._display: Any = None
        self._bar: tqdm | None = None

    def update(self, step: int, values: dict[str, float] | None = None, state: str = "running") -> None:
        """Show a step. Calls may come often; lines and notebooks are drawn only now and then."""
        if values:
            self._headline.update(values)
        moved = step != self.step
        self.step, self.state = step, state
        if self._began is None or step < self._began[0]:
            self._began = (step, time.monotonic())
        if self.mode == "bar":
            self._draw_bar()
            return
        pause = self.every if self.mode == "lines" else 0.5
        changed = (step, state) != self._drawn
        due = time.monotonic() - self._shown >= pause
        if changed and (due or (moved and step >= self.total) or state != (self._drawn or (0, ""))[1]):
            self._show()

    def remaining(self) -> float | None:
        """Seconds left at the speed since the first update; None while there is no speed yet."""
        if self._began is None or self.step <= self._began[0]:
            return None
        speed = (time.monotonic() - self._began[1]) / (self.step - self._began[0])
        return max(self.total - self.step, 0) * speed

    def line(self) -> str:
        """The whole story in one line."""
        share = 100 * self.step / self.total if self.total else 0
        parts = [f"{self.label}: {self.state or 'waiting'} {self.step}/{self.total} ({share:.0f}%)"]
        if headline := describe(self._headline):
            parts.append(headline)
        if self.state == "running" and self.step < self.total:
            parts.append(f"{clock(self.remaining())} left")
        return " · ".join(parts)

    def note(self, message: str) -> None:
        """A message that stays, beside the bar."""
        if self._bar is not None:
            self._bar.write(message, file=self.stream)
        else:
            print(message, file=self.stream, flush=True)

    def close(self, state: str | None = None) -> None:
        """The last word; the bar stays visible."""
        self.state = state or self.state
        if self.mode == "bar":
            if self._bar is not None:
                self._draw_bar()
                self._bar.close()
                self._bar = None
        elif (self.step, self.state) != self._drawn:
            self._show()

    def _draw_bar(self) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=self.total, initial=self.step, file=self.stream, unit="step", dynamic_ncols=True
            )
        self._bar.set_description_str(f"{self.label} {self.state}".strip(), refresh=False)
        self._bar.set_postfix_str(describe(self._headline), refresh=False)
        self._bar.n = self.step
        self._bar.refresh()

    def _show(self) -> None:
        self._shown, self._drawn = time.monotonic(), (self.step, self.state)
        if self.mode == "lines":
            print(self.line(), file=self.stream, flush=True)
            return
        # One output, updated in place: plain HTML needs no widget and stays readable in an exported notebook.
        from IPython.display import display

        bundle = {
            "text/plain": self.line(),
            "text/html": (
                f'<progress value="{self.step}" max="{max(self.total, 1)}" style="width:18em"></progress> '
                f"<code>{html.escape(self.line())}</code>"
            ),
        }
        if self._display is None:
            self._display = display(bundle, raw=True, display_id=True)
        else:
            self._display.update(bundle, raw=True)


class ConsoleSink:
    """Progress on the standard error of rank 0: a bar on a terminal, else a line every ``every`` seconds."""

    def __init__(self, stream: IO[str] | None = None, every: float = 30.0):
        self._stream, self._every = stream, every
        self._progress: Progress | None = None

    def open(self, run_dir: Path, recipe: Any, provenance: dict[str, Any]) -> None:
        self._progress = Progress(
            recipe.schedule.steps, Path(run_dir).name, stream=self._stream, every=self._every
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        assert self._progress is not None, "open() first"
        self._progress.update(step, values)

    def event(self, kind: str, message: str) -> None:
        assert self._progress is not None, "open() first"
        self._progress.note(f"[{kind}] {message}")

    def close(self, state: str) -> None:
        if self._progress is not None:
            self._progress.close(state)
