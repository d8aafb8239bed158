"""The live view of one run: where it stands, its curves, its chips, its log, and buttons to steer it.

    LiveView(run)                  # in a notebook: shows itself and keeps itself up to date
    LiveView(attach("last"))       # in another kernel, or after a restart: the same

Everything comes from the run's files, looked at once a second by one thread for all views; a run that has ended is read
once. Without anybody in front of it (papermill, a script) it shows the same numbers as plain HTML.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.runs.api import Run, attach
from lab_utils.widgets._place import headless

if TYPE_CHECKING:
    import ipywidgets as w

    from lab_utils.widgets._board import Board


class LiveView:
    """A view of a run.

    Args:
        run: a run, or the name of one as ``attach`` takes it.
        root: the folder of runs, where a name is given; absent: ``ASCENT_RUNS``, else ``./runs``.

    Raises:
        RunError: there is no such run.
    """

    def __init__(self, run: Run | str | Path = "last", root: str | Path | None = None):
        self.run = run if isinstance(run, Run) else attach(run, root)
        self._board: Board | None = None

    @property
    def board(self) -> Board:
        """The widgets one by one, made when they are first wanted."""
        if self._board is None:
            from lab_utils.widgets._board import Board

            self._board = Board(self.run)
        return self._board

    @property
    def widget(self) -> w.VBox:
        """What a notebook shows."""
        return self.board.widget

    def html(self) -> str:
        """The run as it is now, as HTML that needs neither a kernel nor a script."""
        from lab_utils.widgets._still import still

        return still(self.run)

    def close(self) -> None:
        """Look no more, and take the widgets away."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def __repr__(self) -> str:
        return f"<LiveView of {self.run!r}>"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if headless():
            return {"text/plain": repr(self), "text/html": self.html()}
        return self.widget._repr_mimebundle_(**options)
