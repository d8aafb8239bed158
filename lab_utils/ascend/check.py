"""``lab ascend check``: rows of check, ok, proves. Each file of ``checks`` runs in a child process of its own.

A check is a module with ``ORDER``, ``PROVES`` (part -> what a pass proves) and ``run()``, which yields ``(part, ok,
found)`` for every part; what it raises fails the part that is next. ``STAND_IN = False`` runs it in the plain
environment. Adding one is adding a file. Nothing here imports torch, and the modules do so in ``run`` alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab_utils.ascend import stand_in
from lab_utils.registry import load, members

CHECKS = "lab_utils.ascend.checks"
SECONDS = 600.0  # of one child; on a quiet machine none takes two minutes
# The last word of every report: what no row here can say.
LIMITS = (
    "A pass proves that the code runs up to the chip: names, arguments, shapes, dtypes, formulas of gradients, groups. "
    "It proves no number (no kernel has computed anything), no speed, and no limit that only CANN checks: lab ascend "
    "selftest does, on the chips."
)


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        check: its name; ``module.part`` where a module has several.
        ok: whether it passed.
        proves: what a pass proves.
        found: what was found, or why it failed.
        seconds: of its child process, which may have several rows.
    """

    check: str
    ok: bool
    proves: str
    found: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def folder() -> Path:
    """Where the stand-in is kept between checks."""
    from lab_utils.accelerators.cpu import cache_dir

    return cache_dir() / "ascend-stand-in"


def examine(
    names: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
    place: Path | None = None,
) -> list[Row]:
    """Every check, two beside each other where there are cores.

    Args:
        names: of modules; None: all.
        say: is told as each is done.
        place: of the stand-in; absent: ``folder()``.

    Raises:
        NotPossibleHere: the stand-in can't be built on this machine.
        KeyError: there is no such check.
    """
    place = place or folder()
    stand_in.build(place)
    modules = [load(CHECKS, name) for name in names or members(CHECKS)]
    modules.sort(key=lambda module: module.ORDER)

    def run(module: Any) -> list[Row]:
        rows = _child(module, place)
        say(
            f"{module.__name__.rpartition('.')[2]}: {', '.join('ok' if row.ok else 'FAILED' for row in rows)}"
        )
        return rows

    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(min(2, cores)) as pool:
        return [row for rows in pool.map(run, modules) for row in rows]


def _child(module: Any, place: Path) -> list[Row]:
    """The rows of one module, by a process of its own; a row that it doesn't bring has failed."""
    name, began = module.__name__.rpartition(".")[2], time.perf_counter()
    plain = not getattr(module, "STAND_IN", True)
    environment = (
        {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"} if plain else stand_in.environment(place)
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lab_utils.ascend.child", name],
            env=environment,
            cwd=place,  # not where a folder named kernels might lie
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )
        answers, end = _answers(done.stdout), _last_line(done.stderr)
        missing = f"the child ended with code {done.returncode}: {end}"
    except subprocess.TimeoutExpired as error:
        answers = _answers((error.stdout or b"").decode(errors="replace"))
        missing = f"no answer in {SECONDS:.0f} s"
    seconds = round(time.perf_counter() - began, 1)
    rows = []
    for part, proves in module.PROVES.items():
        ok, found = answers.get(part, (False, missing))
        rows.append(Row(name if len(module.PROVES) == 1 else f"{name}.{part}", ok, proves, found, seconds))
    return rows


MARK = "ascend-check "  # begins a line of a child's answer; libraries write to standard output too


def _answers(text: str) -> dict[str, tuple[bool, str]]:
    found = [json.loads(line.removeprefix(MARK)) for line in text.splitlines() if line.startswith(MARK)]
    return {part: (ok, why) for part, ok, why in found}


def _last_line(text: str) -> str:
    kept = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in kept if "Error" in line and "applicaiton" not in line]
    return (errors or kept or ["no message"])[-1][:400]


def show(rows: Sequence[Row]) -> None:
    """A table for a person, how many failed, and what all this can't prove."""
    from lab_utils.console import table

    lines = [("pass" if row.ok else "FAIL", row.check, row.found, row.proves) for row in rows]
    table("lab ascend check", ["", "check", "found", "what a pass proves"], lines)
    failed = [row.check for row in rows if not row.ok]
    print(
        f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}"
        if failed
        else f"{len(rows)} checks passed"
    )
    print(LIMITS)
