"""The rows of the table of runs, and the grid that shows them in the browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anywidget
import traitlets as t

from lab_utils.runs.overview import Row
from lab_utils.widgets._static import script, style


@dataclass(frozen=True)
class Column:
    """One column: its title, what a cell says, and what rows are ordered by."""

    title: str
    value: Callable[[Row], Any]
    text: Callable[[Any], str] = lambda value: str(value)
    right: bool = False
    kind: str = "text"

    def cell(self, row: Row) -> tuple[str, Any]:
        value = self.value(row)
        return ("" if value is None else self.text(value)), value


def _metric(key: str) -> Callable[[Row], float | None]:
    return lambda row: (row.metrics or {}).get(key)


def since(created: float) -> str:
    """``12 min``, ``3.5 h``, ``9 d`` ago."""
    seconds = max(time.time() - created, 0.0)
    for size, unit in ((86400 * 2, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            count = seconds / (86400 if unit == "d" else size)
            return f"{count:.0f} {unit}" if unit != "h" else f"{count:.1f} h"
    return f"{seconds:.0f} s"


COLUMNS = (
    Column("run", lambda row: row.name),
    Column("state", lambda row: row.state, kind="state"),
    Column("objective", lambda row: row.objective),
    Column(
        "step",
        lambda row: row.step,
        lambda step: f"{step:,}",
        right=True,
    ),
    Column("of", lambda row: row.total_steps or None, lambda steps: f"{steps:,}", right=True),
    Column("loss", _metric("train/loss"), lambda v: f"{v:.4g}", right=True),
    Column("eval", _metric("eval/loss"), lambda v: f"{v:.4g}", right=True),
    Column("reward", _metric("train/reward"), lambda v: f"{v:.3g}", right=True),
    Column("exact %", lambda row: row.exact_match, lambda v: f"{100 * v:.1f}", right=True),
    Column("tokens/s", _metric("perf/tokens_per_s"), lambda v: f"{v:,.0f}", right=True),
    Column("MFU %", _metric("perf/mfu"), lambda v: f"{100 * v:.1f}", right=True),
    Column("age", lambda row: row.created and -row.created, lambda v: since(-v), right=True),
    Column("owner", lambda row: row.owner),
    Column("tags", lambda row: " ".join(row.tags) or None, kind="tags"),
    Column("note", lambda row: row.note or row.error or None),
)
BY_AGE = next(i for i, column in enumerate(COLUMNS) if column.title == "age")


class Grid(anywidget.AnyWidget):
    """Rows that can be sorted and chosen.

    Attributes:
        rows: ``name``, ``cells`` (texts), ``sort`` (values) and ``about`` of each.
        columns: ``title``, ``right``, ``kind`` of each that is shown.
        order: the column that is sorted by, and whether downwards.
        chosen: names of the rows that are chosen.
        waiting: what is said where there is no row.
        watched: pages that show it; -1 before the first.
    """

    _esm = script("runs")
    _css = style("runs")
    rows = t.List(t.Dict()).tag(sync=True)
    columns = t.List(t.Dict()).tag(sync=True)
    order = t.List([0, False]).tag(sync=True)
    chosen = t.List(t.Unicode()).tag(sync=True)
    waiting = t.Unicode("").tag(sync=True)
    watched = t.Int(-1).tag(sync=True)

    def show(self, rows: list[Row], waiting: str) -> None:
        """Bring the grid to these rows; columns that no row has anything in are left out."""
        cells = [[column.cell(row) for column in COLUMNS] for row in rows]
        used = [
            i for i, c in enumerate(COLUMNS) if i < 2 or any(row[i][1] not in (None, "") for row in cells)
        ]
        columns = [{"title": c.title, "right": c.right, "kind": c.kind} for c in (COLUMNS[i] for i in used)]
        with self.hold_sync():
            if columns != self.columns:
                titles = [column["title"] for column in self.columns]
                by, down = (titles[self.order[0]], self.order[1]) if titles else ("age", False)
                now = [column["title"] for column in columns]
                self.columns, self.order = columns, [now.index(by) if by in now else 0, down]
            self.waiting = waiting
            self.rows = [
                {
                    "name": row.name,
                    "cells": [texts[i][0] for i in used],
                    "sort": [texts[i][1] for i in used],
                    "about": row.error or row.note or str(row.path),
                }
                for row, texts in zip(rows, cells)
            ]
            there = {row.name for row in rows}
            if any(name not in there for name in self.chosen):
                self.chosen = [name for name in self.chosen if name in there]
