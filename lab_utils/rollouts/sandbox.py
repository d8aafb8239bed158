"""Python that isn't trusted, run in a process of its own: the verifier of ``code`` rewards.

What it gets: an empty environment, a working folder of its own, no modules but the standard library, limits of wall and
CPU time, address space, processes, files and output. Where the system allows it (root, or user namespaces) it also gets
no network, no sight of other processes, and none survives it; as root, it runs as another user, since the limit of
processes and the rights on files mean nothing to root. ``Sandbox.isolation`` says what holds on this machine.

What it doesn't do: files that everybody may read can be read, and memory is limited for each process, not for all.
Code that means to cheat can look into the interpreter that tests it; it has no other hold on the verdict than that:
leaving early with exit code 0 is no pass. Cases of input and output hide what is expected, and have no such hole.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lab_utils.errors import DataError, RunError
from lab_utils.rollouts._cell import Isolation, Limits, Run, Status

__all__ = ["Isolation", "Job", "Limits", "Sandbox", "Verdict"]


@dataclass(frozen=True)
class Job:
    """Code and its tests: statements, of which each raises where it fails, or cases ``{"input", "output"}``."""

    code: str
    tests: str | Sequence[str] | Sequence[dict[str, str]]


@dataclass(frozen=True)
class Verdict:
    """How a job went.

    Attributes:
        status: passed: all tests; failed: one of them, or the code before them; timeout: wall or CPU time; memory;
            crashed: killed by a signal.
        passed, total: tests.
        stderr: the last 2,000 characters.
        seconds: wall time of all runs.
    """

    status: Status
    passed: int
    total: int
    stderr: str
    seconds: float


class Sandbox:
    """Runs jobs, several at a time.

    Args:
        limits: of one run.
        workers: runs at a time.
        python: interpreter; absent: this one.
    """

    def __init__(self, limits: Limits = Limits(), workers: int = 4, python: str | None = None) -> None:
        self.limits, self.workers, self.python = limits, workers, python or sys.executable
        self._isolation: Isolation | None = None
        self._lock = threading.Lock()

    @property
    def isolation(self) -> Isolation:
        """The strongest that works here; tried once.

        Raises:
            RunError: not even the weakest runs a line of Python.
        """
        with self._lock:
            if self._isolation is None:
                self._isolation = self._tried()
            return self._isolation

    def run(self, jobs: Sequence[Job]) -> list[Verdict]:
        """The verdict on each job, in order.

        Raises:
            DataError: tests that are neither statements nor cases.
            RunError: see ``isolation``.
        """
        tests = [_checked(job.tests) for job in jobs]
        if not jobs:
            return []
        isolation = self.isolation
        with ThreadPoolExecutor(min(self.workers, len(jobs))) as pool:
            return list(pool.map(lambda job, each: self._verdict(job.code, each, isolation), jobs, tests))

    # -- a job -----------------------------------------------------------------------------------------------

    def _verdict(self, code: str, tests: list[Any], isolation: Isolation) -> Verdict:
        started = time.monotonic()
        if isinstance(tests[0], str):
            run = self._one(code, isolation, statements=tests)
            status, passed = run.status, sum(run.passed) if run.status in ("passed", "failed") else 0
            return Verdict(status, passed, len(tests), run.stderr, time.monotonic() - started)
        status, passed, stderr = "passed", 0, ""
        for case in tests:
            run = self._one(code, isolation, given=case["input"])
            right = run.status == "passed" and _lines(run.stdout) == _lines(case["output"])
            passed += right
            if not right and status == "passed":
                status, stderr = "failed" if run.status == "passed" else run.status, run.stderr
            if run.status == "timeout":
                break  # the other cases would take as long
        return Verdict(status, passed, len(tests), stderr, time.monotonic() - started)

    def _one(self, code: str, isolation: Isolation, **options: Any) -> Run:
        return Run(self.limits, self.python, isolation, code, **options)

    def _tried(self) -> Isolation:
        root = os.geteuid() == 0
        candidates = [
            *([Isolation(True, True), Isolation(False, True)] if root else []),
            Isolation(True, False, True),
            Isolation(False, False),
        ]
        for isolation in candidates:
            run = self._one(
                "import decimal, socket", isolation, statements=["assert decimal.Decimal(1) == 1"]
            )
            if run.status == "passed":
                return isolation
        raise RunError(
            f"The sandbox can't run a line of Python ({self.python}: {run.stderr.strip()[-200:] or run.status}): give "
            "it more time or memory, or leave the reward code out."
        )


def _checked(tests: Any) -> list[Any]:
    tests = [tests] if isinstance(tests, str) else list(tests)
    statements = all(isinstance(test, str) for test in tests)
    cases = all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests)
    if not tests or not (statements or cases):
        raise DataError(
            "The tests of a row are neither Python statements nor cases with input and output: correct the column."
        )
    return tests


def _lines(text: str) -> list[str]:
    """Lines without what nobody sees: whitespace at their ends, empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
