"""Is this machine fit for the work? Rows of check, ok, found, advice: each passes, says what to do, or doesn't apply.

    for row in examine():
        print(row.check, row.ok, row.found, row.advice)

A check is a file of ``doctor/checks`` with ``ORDER`` and ``check(machine) -> rows``; adding one is adding a file.
Nothing here imports torch: a child process does, under a time limit, since on a login node that import may be what
fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lab_utils.doctor._machine import Machine, Row
from lab_utils.registry import load, members

CHECKS = "lab_utils.doctor.checks"
MARKS = {True: "pass", False: "FAIL", None: "–"}


def examine(
    *,
    runs: str | Path | None = None,
    peers: Sequence[str] = (),
    quick: bool = False,
    machine: Machine | None = None,
) -> list[Row]:
    """Every check of this machine, in order.

    Args:
        runs: folder of runs; absent: ``ASCENT_RUNS``, else ``./runs``.
        peers: other nodes, ``HOST`` or ``HOST:PORT``, that must be reachable.
        quick: leave out what takes seconds.
        machine: another place to look at, in tests.
    """
    machine = machine or Machine.here(runs=runs, peers=peers, quick=quick)
    modules = [(load(CHECKS, name), name) for name in members(CHECKS)]
    rows: list[Row] = []
    for module, name in sorted(modules, key=lambda pair: (pair[0].ORDER, pair[1])):
        try:
            rows += module.check(machine)
        except Exception as error:  # a check may meet anything, and the others are worth having
            text = " ".join(str(error).split())[:200]
            rows.append(
                Row(name, False, f"{type(error).__name__}: {text}", "This check itself failed: report it.")
            )
    return rows


def show(rows: Sequence[Row]) -> None:
    """A table for a person, and how many checks failed."""
    from lab_utils.console import table

    lines = [(MARKS[row.ok], row.check, row.found, row.advice) for row in rows]
    table("lab doctor", ["", "check", "found", "what to do"], lines)
    failed = [row.check for row in rows if row.ok is False]
    print(
        f"{len(failed)} of {len(rows)} checks failed: {', '.join(failed)}"
        if failed
        else f"{len(rows)} checks, none failed"
    )
