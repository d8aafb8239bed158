"""The table of runs: filter, sort, compare, fork, annotate, delete.

    RunTable()                   # the runs of ASCENT_RUNS, else ./runs
    table.chosen                 # the runs that are chosen, as Run objects

It follows the folder: runs of others appear as they are launched, and a damaged one says what is wrong with it.
"""

from __future__ import annotations

import html
from pathlib import Path
from threading import Lock
from typing import Any

import ipywidgets as w

from lab_utils.errors import RunError
from lab_utils.panels.layout import PANELS
from lab_utils.runs.api import Run
from lab_utils.runs.compare import settings
from lab_utils.runs.directory import RunDirectory
from lab_utils.runs.overview import Overview, Row
from lab_utils.widgets._guard import guarded
from lab_utils.widgets._place import headless
from lab_utils.widgets._pulse import subscribe
from lab_utils.widgets._runs import Grid
from lab_utils.widgets._standing import Asker

EVERY = 2.0
PATIENCE = 1.0  # seconds that the first look may keep a cell waiting
MOST = 8  # runs whose curves are told apart by colour


class RunTable:
    """All runs of a folder.

    Args:
        root: the folder; absent: ``ASCENT_RUNS``, else ``./runs``.
        follow: look again every ``EVERY`` seconds.
    """

    def __init__(self, root: str | Path | None = None, *, follow: bool = True):
        self._overview = Overview(root)
        self.rows: list[Row] = []
        self._reading, self._looks, self._brought = Lock(), 0, 0
        self._asker = Asker(self._read)
        self._sure = False  # whether Delete was pressed once
        self._build()
        self._handle = None
        if not follow or headless():
            self.look()
            return
        self._asker.wait(PATIENCE)
        self._beat()
        self._handle = subscribe(self._beat, EVERY)

    @property
    def root(self) -> Path:
        return self._overview.root

    @property
    def chosen(self) -> list[Run]:
        """The runs that are chosen, in the table's order."""
        by_name = {row.name: row for row in self.rows}
        return [Run(RunDirectory(by_name[name].path)) for name in self.grid.chosen if name in by_name]

    def close(self) -> None:
        """No longer look at the folder."""
        if self._handle is not None:
            self._handle.cancel()

    # -- building ------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self.search = w.Text(placeholder="Filter: words of name, state, owner, tags, note").add_class(
            "lab-grow"
        )
        self.count = w.HTML()
        self.grid = Grid()
        self.compare = w.Button(
            description="Compare", disabled=True, tooltip="Curves and settings of the chosen runs"
        )
        self.fork = w.Button(description="Fork…", disabled=True, tooltip="A form with this run's recipe")
        self.follow = w.Button(description="Open", disabled=True, tooltip="The live view of this run")
        self.tags = w.Text(placeholder="tags").add_class("lab-grow")
        self.note = w.Text(placeholder="note").add_class("lab-grow")
        self.write = w.Button(description="Write", disabled=True, tooltip="Tags and note to the chosen runs")
        self.delete = w.Button(description="Delete", disabled=True)
        self.keep = w.Button(description="Keep", layout=w.Layout(display="none"))
        self.status = w.HTML()
        self.below = w.VBox()
        self.search.observe(lambda _: self._show(), "value")
        self.grid.observe(lambda _: self._choose(), "chosen")
        self.compare.on_click(lambda _: self._compare())
        self.fork.on_click(lambda _: self._fork())
        self.follow.on_click(lambda _: self._open())
        self.write.on_click(lambda _: self._write())
        self.delete.on_click(lambda _: self._delete())
        self.keep.on_click(lambda _: self._doubt())
        top = w.HBox((self.search, self.count)).add_class("lab-bar")
        actions = (
            self.compare,
            self.follow,
            self.fork,
            self.tags,
            self.note,
            self.write,
            self.delete,
            self.keep,
        )
        bar = w.HBox(actions).add_class("lab-bar")
        self.widget = w.VBox((top, self.grid, bar, self.status, self.below)).add_class("lab-table")

    # -- showing -------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read the folder again, now."""
        self._bring(self._read())

    def _beat(self) -> None:
        """In the timer's thread. The folder is read in another: it may be large, and of runs a scheduler is asked."""
        if self.grid.watched == 0:  # it was on a page, and was cleared away
            return
        self._asker.ask(EVERY)
        if self._asker.error is not None:
            self.say(f"{self.root} cannot be read ({self._asker.error}).", bad=True)
        if self._asker.answer is not None:
            self._bring(self._asker.answer)
        elif not self.rows:
            self.grid.show([], f"Reading the runs of {self.root}…")

    def _read(self) -> tuple[int, list[Row]]:
        """The rows, and a number that is higher the later they were read."""
        with self._reading:
            self._looks += 1
            return self._looks, self._overview.rows()

    def _bring(self, read: tuple[int, list[Row]]) -> None:
        number, rows = read
        if number > self._brought:
            self._brought, self.rows = number, rows
            self._show()

    def _show(self) -> None:
        words = self.search.value.lower().split()
        shown = [row for row in self.rows if all(word in row.words for word in words)]
        waiting = (
            f"No run fits '{self.search.value}'."
            if self.rows
            else f"There are no runs in {self.root}: start one with lab run RECIPE, or set ASCENT_RUNS to their folder."
        )
        self.grid.show(shown, waiting)
        many = f"{len(shown)} of {len(self.rows)} runs" if words else f"{len(self.rows)} runs"
        self.count.value = f'<span class="lab-soft">{many} in {html.escape(str(self.root))}</span>'

    @guarded
    def _choose(self) -> None:
        chosen = self.chosen
        one = len(chosen) == 1
        self.compare.disabled = len(chosen) < 2
        self.fork.disabled = self.follow.disabled = not one
        self.write.disabled = self.delete.disabled = not chosen
        self.tags.value = " ".join(chosen[0].tags) if one else ""
        self.note.value = chosen[0].notes if one else ""
        self._doubt()
        self.say("")

    def say(self, sentence: str, bad: bool = False) -> None:
        """The status line."""
        kind = "lab-bad" if bad else "lab-soft"
        self.status.value = f'<span class="{kind}">{html.escape(sentence)}</span>' if sentence else ""

    # -- what a person does --------------------------------------------------------------------------------

    @guarded
    def _compare(self) -> None:
        """Curves of the chosen runs over one another, and the settings in which they differ."""
        from lab_utils.runs.series import Series
        from lab_utils.widgets._chart import Curves

        chosen = self.chosen
        if len(chosen) < 2:
            raise RunError("Choose two runs or more to compare them.")
        if len(chosen) > MOST:
            raise RunError(
                f"{len(chosen)} runs are chosen, and curves of {MOST} can be told apart: choose fewer."
            )
        series = []
        for run in chosen:
            each = Series(run.path / "metrics.jsonl")
            each.poll()
            series.append((run.name, each.buckets))
        curves = Curves()
        curves.compare(series, PANELS)
        self.below.children = (curves, w.HTML(difference_html(chosen)))
        self.say("")

    @guarded
    def _open(self) -> None:
        from lab_utils.widgets.live import LiveView

        (run,) = self.chosen
        self.below.children = (LiveView(run).widget,)

    @guarded
    def _fork(self) -> None:
        from lab_utils.widgets.form import LaunchForm

        (run,) = self.chosen
        self.form = LaunchForm(run.fork(), root=self.root)
        self.below.children = (self.form.widget,)

    @guarded
    def _write(self) -> None:
        chosen = self.chosen
        for run in chosen:
            run.tags = self.tags.value
            if len(chosen) == 1 or self.note.value.strip():
                run.notes = self.note.value
        self.look()
        self.say(f"Written to {len(chosen)} run{'s' if len(chosen) > 1 else ''}.")

    @guarded
    def _delete(self) -> None:
        chosen = self.chosen
        if not self._sure:
            self._sure = True
            checkpoints = sum(len(run.directory.checkpoints()) for run in chosen)
            self.delete.description, self.delete.button_style = f"Really delete {len(chosen)}", "danger"
            self.keep.layout.display = ""
            self.say(
                f"{', '.join(run.name for run in chosen)}: with {checkpoints} checkpoints. There is no way back."
            )
            return
        self._doubt()
        gone = []
        try:
            for run in chosen:
                run.delete()
                gone.append(run.name)
        finally:
            self.look()
        self.say(f"Deleted {', '.join(gone)}.")

    def _doubt(self) -> None:
        self._sure = False
        self.delete.description, self.delete.button_style = "Delete", ""
        self.keep.layout.display = "none"

    def __repr__(self) -> str:
        return f"<RunTable: {len(self.rows)} runs in {self.root}>"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if not headless():
            return self.widget._repr_mimebundle_(**options)
        shown = ("name", "state", "step", "total_steps", "owner", "tags", "note")
        cells = [[getattr(row, name) for name in shown] for row in self.rows]
        return {"text/plain": repr(self), "text/html": table_html(shown, cells)}


def difference_html(runs: list[Run]) -> str:
    """The settings in which runs differ, a column a run."""
    found = settings({run.name: run.recipe for run in runs})
    if not found:
        return '<span class="lab-soft">The same recipe: no setting differs.</span>'
    rows = [[key, *(values[run.name] for run in runs)] for key, values in found.items()]
    return table_html(["", *(run.name for run in runs)], rows)


def table_html(heads: Any, rows: Any) -> str:
    """A small table."""

    def text(value: Any) -> str:
        if isinstance(value, tuple):
            value = " ".join(map(str, value))
        if isinstance(value, list):
            value = "; ".join(map(_brief, value))
        return "–" if value is None else html.escape(str(value))

    head = "".join(f"<th>{text(each)}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{text(each)}</td>' for each in row)}</tr>" for row in rows)
    return f'<table class="lab-diff"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _brief(item: Any) -> str:
    """An item of a list of sections: what it sets, without what is empty."""
    if not isinstance(item, dict):
        return str(item)
    return " ".join(f"{key}={value}" for key, value in item.items() if value not in (None, [], {}, ""))
