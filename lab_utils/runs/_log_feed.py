"""The logs of a run as they are written: the end of one, and the lines of all that look like errors."""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from lab_utils.launchers._ascend_errors import SIGNATURES
from lab_utils.launchers._base import log_files
from lab_utils.runs._appended import Appended

TAIL = 16 * 2**10
LINES, ERRORS = 80, 12
CUT = 600  # characters of a line that are kept
LIST_SECONDS = 5.0
AT_ONCE = 32  # files that are looked at in one poll, beside the one that is shown
LEAD = ("rank-0.log", "node-0.log", "launcher.log")  # the first of them that has anything is shown

_BEGIN = re.compile(r"^--- rank \d+, process \d+")
_ERROR = re.compile(
    r"\b(?:ERROR|FATAL|CRITICAL)\b|^error: |\b\w*(?:Error|Exception)(?:: |$)|\b[Oo]ut of memory\b|"
    r"\bSegmentation fault\b|\bwas killed by\b|^slurmstepd: error"
)
_NUMBER = re.compile(r"\b\d+(?:\.\d+)?\b")
# What torchrun prints around the error proper.
_FRAME = re.compile(r"^\s*(?:error_file|traceback)\s*:|ChildFailedError|^E\d{4} .*failed \(exitcode")


@dataclass
class ErrorLine:
    """A line that looks like an error.

    Attributes:
        text: the line, as it came last.
        file: the log in which it was first seen.
        files: logs that have it.
        count: how often it came.
        advice: what it means and what to do, where that is known.
    """

    text: str
    file: str
    files: set[str]
    count: int = 0
    advice: str = ""


class LogFeed:
    """``logs/*.log`` of a run, followed; thousands of them a few at a time.

    Attributes:
        shown: name of the log whose end is kept.
        lines: the end of it.
        errors: of all logs and the present attempt, the newest last; lines that differ in numbers alone are one.
    """

    def __init__(self, run_path: Path):
        self._folder, self._listed, self._next = run_path / "logs", -LIST_SECONDS, 0
        self._files: dict[str, Appended] = {}
        self._ends: dict[str, deque[str]] = {name: deque(maxlen=LINES) for name in LEAD}
        self.errors: dict[str, ErrorLine] = {}

    @property
    def shown(self) -> str:
        return next((name for name in LEAD if self._ends[name]), LEAD[-1])

    @property
    def lines(self) -> list[str]:
        return list(self._ends[self.shown])

    def poll(self) -> bool:
        """Whether anything of what is kept has changed."""
        if time.monotonic() - self._listed > LIST_SECONDS:
            for path in log_files(self._folder):
                self._files.setdefault(path.name, Appended(path, newest=TAIL, lazily=path.name not in LEAD))
            self._listed = time.monotonic()
        others = [name for name in self._files if name not in LEAD]
        turn = [others[(self._next + i) % len(others)] for i in range(min(AT_ONCE, len(others)))]
        self._next += len(turn)
        names = [*(name for name in LEAD if name in self._files), *turn]
        return any([self._read(name) for name in names])

    def _read(self, name: str) -> bool:
        part = self._files[name].read(most=TAIL)
        changed = bool(part.lines) and name in LEAD
        if part.afresh and name in LEAD:
            self._ends[name].clear()
        for _, line in part.lines:
            # A progress bar overwrites its line: what was last on it counts.
            text = line.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2][:CUT]
            if name in LEAD:
                self._ends[name].append(text)
            if _BEGIN.match(text):
                changed |= self._forget(name)
            elif _ERROR.search(text) and not _FRAME.search(text):
                self._note(name, text.strip())
                changed = True
        return changed

    def _note(self, name: str, text: str) -> None:
        advice = _advice(text)
        key = f"{_NUMBER.sub('#', text)} {advice}"  # ranks, steps and times don't make it another error
        found = self.errors.pop(key, None) or ErrorLine(text, name, set(), advice=advice)
        found.text = text
        found.files.add(name)
        found.count += 1
        self.errors[key] = found
        while len(self.errors) > ERRORS:
            del self.errors[next(iter(self.errors))]

    def _forget(self, name: str) -> bool:
        """Another attempt begins in this log: errors of the one before are history."""
        before = len(self.errors)
        for key, error in list(self.errors.items()):
            error.files.discard(name)
            if not error.files:
                del self.errors[key]
        return len(self.errors) != before


def _advice(text: str) -> str:
    found = next((each for each in SIGNATURES if not each.wrapper and each.pattern.search(text)), None)
    return f"{found.meaning}: {found.action}" if found else ""
