"""The launch of a form's recipe, in a thread: the kernel goes on answering."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lab_utils.errors import LabError
from lab_utils.recipe import Recipe
from lab_utils.widgets._away import Away

if TYPE_CHECKING:
    from lab_utils.runs.api import Run


class Job:
    """One launch at a time.

    Args:
        done: called in the thread with the run, or with None and why there is none.

    Attributes:
        busy: a launch is under way.
        refusal: why the last launch came to nothing; empty: it didn't.
    """

    def __init__(self, done: Callable[[Run | None, str], None]):
        self.busy, self.refusal = False, ""
        self._done, self._away = done, Away()
        self._thread: threading.Thread | None = None

    def start(self, recipe: Recipe, root: Path) -> None:
        self.busy, self.refusal = True, ""
        self._thread = threading.Thread(target=self._run, args=(recipe, root), daemon=True)
        self._thread.start()

    def settle(self) -> str:
        """Wait for a launch under way; the refusal of the last one."""
        if (thread := self._thread) is not None:
            thread.join()
        return self.refusal

    def _run(self, recipe: Recipe, root: Path) -> None:
        from lab_utils.runs.api import attach

        run = None
        try:
            run = attach(self._away.ask("start", recipe, root=str(root)))
        except Exception as error:  # a thread's error would be lost
            self.refusal = str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}"
        self.busy = False
        self._done(run, self.refusal)
