"""All runs of a folder as rows of a table, read again only where a file has changed; a damaged run is a row too.

overview = Overview(root)
overview.rows()          # newest first; a second later: a few stat calls a run
"""

from __future__ import annotations

import contextlib
import os
import pwd
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.errors import LabError
from lab_utils.runs import notes
from lab_utils.runs.api import Run
from lab_utils.runs.compare import exact_match, number
from lab_utils.runs.directory import RunDirectory, age, default_root
from lab_utils.runs.states import FINAL
from lab_utils.runs.steps import merge_steps
from lab_utils.telemetry import jsonl

if TYPE_CHECKING:
    import pandas as pd

FILES = ("recipe.yaml", "status.json", "metrics.jsonl", "report.json", notes.FILE)
TAIL = 2**17  # bytes at the end of metrics.jsonl in which the last values are looked for
KEYS = ("train/loss", "eval/loss", "perf/tokens_per_s", "train/reward", "perf/mfu")


@dataclass(frozen=True)
class Row:
    """A run as a table shows it.

    Attributes:
        owner: who launched it, by the directory's owner.
        state: one of ``runs.states``, or ``damaged``.
        recipe: the recipe's name, and ``objective`` its kind.
        metrics: last values of ``KEYS`` that were logged.
        exact_match: 0–1, after the run, where it was evaluated.
        created: seconds since the epoch.
        error: why it failed, or what is damaged.
    """

    name: str
    path: Path
    owner: str
    state: str
    recipe: str = ""
    objective: str = ""
    step: int = 0
    total_steps: int = 0
    metrics: dict[str, float] | None = None
    exact_match: float | None = None
    created: float | None = None
    tags: tuple[str, ...] = ()
    note: str = ""
    error: str = ""

    @property
    def words(self) -> str:
        """What a search looks in."""
        parts = (
            self.name,
            self.owner,
            self.state,
            self.recipe,
            self.objective,
            *self.tags,
            self.note,
            self.error,
        )
        return " ".join(parts).lower()


class Overview:
    """The runs below one folder.

    Args:
        root: absent: ``ASCENT_RUNS``, else ``./runs``.
    """

    def __init__(self, root: str | Path | None = None):
        self.root = Path(root) if root is not None else default_root()
        self._kept: dict[Path, tuple[tuple, Row]] = {}

    def rows(self) -> list[Row]:
        """Every run, newest first."""
        folders = [path for path in self._folders() if any(_there(path / name) for name in FILES[:2])]
        ordered = sorted(map(RunDirectory, folders), key=_age, reverse=True)
        rows = [self._row(run) for run in ordered]
        self._kept = {row.path: self._kept[row.path] for row in rows}
        return rows

    def _folders(self) -> list[Path]:
        try:
            return [Path(entry.path) for entry in os.scandir(self.root) if not entry.name.startswith(".")]
        except OSError:
            return []

    def _row(self, run: RunDirectory) -> Row:
        signature = tuple(_signature(run.path / name) for name in FILES)
        kept = self._kept.get(run.path)
        if kept is None or kept[0] != signature:
            kept = self._kept[run.path] = signature, _read(run)
        row = kept[1]
        if row.state in FINAL or row.state == "damaged":
            return row
        # Whether it is still there is no matter of its files alone.
        status = Run(run).status
        return replace(row, state=status["state"], error=status["error"] or "")


def frame(root: str | Path | None = None) -> pd.DataFrame:
    """All runs as a DataFrame, newest first: a row a run, last values of metrics in columns of their own."""
    import pandas as pd

    found = [{**asdict(row), **(row.metrics or {})} for row in Overview(root).rows()]
    table = pd.DataFrame(found).drop(columns="metrics", errors="ignore")
    if found:
        table = table.set_index("name").rename_axis("run")
    if "created" in table:
        table["created"] = pd.to_datetime(table["created"], unit="s")
    return table


def _read(run: RunDirectory) -> Row:
    written = notes.read(run.path)
    row = Row(run.name, run.path, _owner(run.path), "damaged", tags=written.tags, note=written.text)
    try:
        recipe = run.recipe
        status = Run(run).status
    except LabError as error:
        return replace(row, error=str(error))
    except (
        Exception
    ) as error:  # another version's file, a disk that fails: a row that says so, not a dead table
        return replace(row, error=f"{run.path} cannot be read ({type(error).__name__}: {error}).")
    return replace(
        row,
        state=status["state"],
        recipe=recipe.name,
        objective=recipe.objective.kind,
        step=int(number(status["step"]) or 0),
        total_steps=int(number(status["total_steps"]) or recipe.schedule.steps),
        metrics=_last(run.path / "metrics.jsonl"),
        exact_match=exact_match(Run(run)).get("exact match"),
        created=number(status.get("created")),
        error=status["error"] or "",
    )


def _last(path: Path) -> dict[str, float]:
    """Last values of the metrics that a table shows, from the end of the file."""
    parsed, _ = jsonl.newest(path, TAIL)
    values: dict[str, Any] = {}
    for _, found in sorted(merge_steps(parsed).items()):
        values |= found
    return {key: value for key in KEYS if (value := number(values.get(key))) is not None}


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the folder of somebody who lets nobody in: a row that says so
        return True


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _owner(path: Path) -> str:
    with contextlib.suppress(OSError):
        number = path.stat().st_uid
        with contextlib.suppress(KeyError):
            return pwd.getpwuid(number).pw_name
        return str(number)
    return "?"


def _age(run: RunDirectory) -> tuple[str, str]:
    try:
        return age(run)
    except OSError:  # renamed, and without a recipe
        return "", run.name
