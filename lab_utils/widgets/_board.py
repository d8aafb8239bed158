"""The widgets of a live view: they look at the run's files when the timer says so, and steer it when a button says so.

Only files are read in the timer's thread; the launcher is asked, and anything done to the run, in threads of their own.
No handler raises: what goes wrong is said in the status line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from threading import Thread

import ipywidgets as w

from lab_utils.errors import LabError, RunError
from lab_utils.runs.api import Run
from lab_utils.runs.follow import Changes, Follower
from lab_utils.runs.states import FINAL
from lab_utils.widgets import _pulse
from lab_utils.widgets._chart import Curves, panels_of
from lab_utils.widgets._standing import (
    Asker,
    Standing,
    ask_launcher,
    error_rows,
    errors_html,
    head,
    standing,
    waiting_for,
    wandb_place,
)
from lab_utils.widgets._strip import ChipStrip, Journal
from lab_utils.widgets._words import text

EVERY = 1.0  # seconds between looks
SLICE = 0.04  # seconds of reading in one look: a long run is caught up with in many short ones
ASK_SECONDS = 5.0  # between questions to the launcher
CONFIRM_SECONDS = 10.0
# Of a request to stop: true until the run has ended.
SAVES, ENDS = (
    "It saves a checkpoint at its next step, then stops.",
    "It ends at its next step, without saving.",
)


class Board:
    """Widgets over one run.

    Args:
        run: the run.
        every: seconds between looks at its files.
    """

    def __init__(self, run: Run, every: float = EVERY):
        self.run, self.every = run, every
        self.follower = Follower(run.path)
        self.asker = Asker(lambda: ask_launcher(run))
        self._panels = panels_of(_objective(run))
        self._working: Thread | None = None
        self._asked_twice = 0.0  # until when a second press of "Stop now" counts
        self._spoken = ""
        self._unseen, self._shown = Changes(), -1e9
        self._build()
        self.handle: _pulse.Handle
        self.start()

    # -- building ------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self.head, self.status, self.errors = w.HTML(), w.HTML().add_class("lab-grow"), w.HTML()
        self.curves, self.chips, self.journal = Curves(), ChipStrip(), Journal()
        self.below = w.VBox()
        self.stop = _button("Stop after a checkpoint", "Save at the next step, then end", self._stop)
        self.stop_now = _button("Stop now", "End at the next step without saving", self._stop_now)
        self.resume = _button("Resume", "Go on from the last checkpoint", self._resume)
        self.fork = _button("Fork", "A launch form with this run's recipe", self._fork)
        self.wandb = _button("W&B", "Where W&B shows this run", self._wandb)
        buttons = (self.stop, self.stop_now, self.resume, self.fork, self.wandb, self.status)
        self.widget = w.VBox(
            (
                self.head,
                w.HBox(buttons).add_class("lab-bar"),
                self.errors,
                self.curves,
                self.chips,
                self.journal,
                self.below,
            )
        )
        self.widget.add_class("lab-live")

    def start(self) -> None:
        """Look from now on, until the run is over."""
        self.handle = _pulse.subscribe(self.look, self.every)

    def close(self) -> None:
        """Look no more, and take the widgets away."""
        self.handle.cancel()
        _close(self.widget)

    # -- looking -------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Bring the widgets to the run's files; in the timer's thread."""
        if self.curves.watched == 0:  # it was on a page, and was cleared away
            return
        try:
            self._look()
        except Exception as error:
            self.say(f"The view could not be brought up to date ({type(error).__name__}: {error}).", bad=True)
            raise

    @property
    def behind(self) -> bool:
        """Whether there was more to read at the last look than fitted into it."""
        return self._unseen.behind

    def _look(self) -> None:
        changes = self._unseen = self.follower.poll(SLICE) + self._unseen
        if not self.follower.status and not self.run.path.is_dir():
            self.say(f"{self.run.path} is gone: the run was deleted or moved.", bad=True)
            self.handle.cancel()
            return
        self.asker.ask(ASK_SECONDS)
        now = standing(self.follower, self.asker.answer)
        if changes.behind:  # catching up with a long run: now and then is often enough to show
            self.handle.soon()
            if time.monotonic() - self._shown < EVERY:
                return
        self._show(changes, now)
        self._shown, self._unseen = time.monotonic(), Changes(behind=changes.behind)
        if now.over and not changes.behind:
            self.handle.cancel()

    def _show(self, changes: Changes, now: Standing) -> None:
        self.head.value = head(self.run.name, now, self.follower.series.latest())
        waiting = waiting_for(now)
        self.curves.waiting = waiting
        self.journal.waiting = "The ranks have written nothing yet."
        self.chips.waiting = _waiting_for_chips(now)
        self._enable(now)
        if now.state in FINAL and self._spoken in (SAVES, ENDS):
            self.say("")
        if changes.bucket is not None or not self.curves.panels:
            self.curves.update(self.follower.series.buckets, changes.bucket or 0, self._panels)
        if changes.chips or (now.over and self.chips.nodes):
            self.chips.update(self.follower.chips, over=now.state in FINAL)
        if changes.log or changes.samples or changes.events:
            self.journal.update(self.follower)
            self.errors.value = errors_html(error_rows(self.follower))

    def _enable(self, now: Standing) -> None:
        ended = now.state in FINAL
        self.stop.disabled = ended or now.state in ("created", "stopping") or self.busy
        self.stop_now.disabled = ended or now.state == "created" or self.busy
        self.resume.disabled = not (ended or now.state == "created") or now.state == "succeeded" or self.busy
        self.fork.disabled = self.busy
        if self._asked_twice and time.monotonic() > self._asked_twice:
            self._unconfirm()

    def say(self, sentence: str, bad: bool = False) -> None:
        """The status line."""
        self._spoken = sentence
        color = "var(--jp-error-color0,#c62828)" if bad else "var(--jp-ui-font-color2,#616e7c)"
        self.status.value = f'<span style="color:{color}">{text(sentence)}</span>'

    # -- steering ------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._working is not None

    def settle(self) -> None:
        """Wait for what a button began."""
        if (thread := self._working) is not None:
            thread.join()

    def _do(self, beginning: str, work: Callable[[], str]) -> None:
        """Work in a thread; its sentence, or what went wrong, is said."""
        if self.busy:
            return
        self._unconfirm()
        self.say(beginning)

        def run() -> None:
            try:
                self.say(work())
            except LabError as error:
                self.say(str(error), bad=True)
            except Exception as error:
                self.say(f"{type(error).__name__}: {error}", bad=True)
            finally:
                self._working = None
                self.asker.forget()
                self._look_again()

        self._working = Thread(target=run, daemon=True)
        for button in (self.stop, self.stop_now, self.resume, self.fork):
            button.disabled = True
        self._working.start()

    def _look_again(self) -> None:
        if self.handle.alive:
            self.handle.soon()
        else:
            self.start()

    def _stop(self) -> None:
        def work() -> str:
            self.run.stop(checkpoint=True, wait=0)
            return SAVES

        self._do("Asking it to stop…", work)

    def _stop_now(self) -> None:
        if time.monotonic() > self._asked_twice:
            self._asked_twice = time.monotonic() + CONFIRM_SECONDS
            self.stop_now.description, self.stop_now.button_style = "Really, without saving?", "danger"
            self.say("Steps since the last checkpoint are lost: press again to stop without saving.")
            return

        def work() -> str:
            self.run.stop(checkpoint=False, wait=0)
            return ENDS

        self._do("Stopping it…", work)

    def _unconfirm(self) -> None:
        self._asked_twice = 0.0
        self.stop_now.description, self.stop_now.button_style = "Stop now", ""

    def _resume(self) -> None:
        self._do("Checking and resuming…", lambda: resume_beside(self.run))

    def _fork(self) -> None:
        try:
            from lab_utils.widgets.form import LaunchForm

            self.below.children = (LaunchForm(self.run.fork(), root=self.run.path.parent).widget,)
            self.say("Below: this run's recipe in a form; what you launch there is a run of its own.")
        except LabError as error:
            self.say(str(error), bad=True)
        except Exception as error:
            self.say(f"{type(error).__name__}: {error}", bad=True)

    def _wandb(self) -> None:
        try:
            address, sentence = wandb_place(self.run)
        except LabError as error:
            self.say(str(error), bad=True)
            return
        self.say(sentence)
        if address:
            link = f'<a href="{text(address)}" target="_blank" rel="noopener">{text(address)}</a> '
            self.status.value = link + self.status.value


def resume_beside(run: Run) -> str:
    """Resume in a process of its own: its checks may read whole data sets, and import what a kernel must not hold.

    Raises:
        RunError: what the command said.
    """
    command = [sys.executable, "-m", "lab_utils.cli", "runs", "resume", str(run.path), "--detach", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(said.removeprefix("error: "))
    return f"Resumed: {json.loads(done.stdout)['state']}."


def _button(description: str, tooltip: str, handler: Callable[[], None]) -> w.Button:
    button = w.Button(description=description, tooltip=tooltip)
    button.on_click(lambda _: handler())
    return button


def _close(widget: w.Widget) -> None:
    for child in getattr(widget, "children", ()):
        _close(child)
    widget.close()


def _objective(run: Run) -> str:
    """Kind of the run's objective; a recipe of another version must not keep its curves from being seen."""
    try:
        return run.recipe.objective.kind
    except LabError:
        return ""


def _waiting_for_chips(now: Standing) -> str:
    if now.state in FINAL:
        return "no samples in this run"
    if now.state in ("created", "queued"):
        return "sampled as soon as the job has its place"
    return "waiting for the first sample: every node takes one every few seconds"
