"""The report of answers before and after training: asked for here, computed in a process of its own.

``report.json`` in the run directory::

    {"manifest": ..., "split": ..., "n": 400,
     "exact_match": {"before": 0.03, "after": 0.88},
     "by_family": {"arithmetic": {"n": 50, "before": 0.0, "after": 0.9}, ...},
     "samples": [{"family": ..., "question": ..., "expected": ..., "before": ..., "after": ...,
                  "before_ok": false, "after_ok": true}, ...]}

Imports no torch: the kernel of a notebook stays free of devices.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.console import table
from lab_utils.errors import RunError

if TYPE_CHECKING:
    import pandas as pd

    from lab_utils.runs.api import Run

REPORT = "report.json"


def evaluate(
    run: Run | Path | str, *, on: str = "ascent-tasks-prompts", split: str = "test", limit: int | None = None
) -> dict[str, Any]:
    """Ask the weights before and after training every question of a split, and check each answer exactly.

    Args:
        run: a run, its name or its path; its last complete checkpoint is the "after".
        on: manifest of format ``prompt``; each row carries what its verifier needs.
        split: split of that manifest.
        limit: at most this many questions, spread over the families; absent: all.

    Returns:
        The report, also written to ``report.json`` in the run directory.

    Raises:
        RunError: the evaluation failed; the message has its last line and where the log is.
    """
    path = Path(getattr(run, "path", run))
    command = [sys.executable, "-m", "lab_utils.evaluation.worker", str(path), "--on", on, "--split", split]
    command += ["--limit", str(limit)] if limit else []
    log = path / "logs" / "evaluation.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as sink:
        done = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise RunError(f"Evaluating {path.name} failed: {lines[-1].removeprefix('error: ')} (log: {log})")
    return read_report(path)


def read_report(path: Path) -> dict[str, Any]:
    """The report of the run at ``path``.

    Raises:
        RunError: the run has none yet.
    """
    try:
        return json.loads((path / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path.name} has no {REPORT} yet: make one with lab eval {path.name}.") from None


def summary(report: dict[str, Any]) -> pd.DataFrame:
    """Exact match in percent by family, and overall in the last row."""
    import pandas as pd

    rows = [
        (family, row["n"], row["before"], row["after"]) for family, row in sorted(report["by_family"].items())
    ]
    rows.append(("all", report["n"], report["exact_match"]["before"], report["exact_match"]["after"]))
    frame = pd.DataFrame(rows, columns=["family", "questions", "before %", "after %"]).set_index("family")
    frame[["before %", "after %"]] = (100 * frame[["before %", "after %"]]).round(1)
    return frame


def answers(report: dict[str, Any], per_family: int = 1) -> pd.DataFrame:
    """Sample answers side by side: question, expected, before, after."""
    import pandas as pd

    frame = pd.DataFrame(report["samples"])
    frame = frame.groupby("family", sort=True).head(per_family).sort_values("family")
    for stage in ("before", "after"):
        mark = frame[f"{stage}_ok"].map({True: "✓ ", False: "✗ "})
        frame[stage] = mark + frame[stage].map(lambda text: text if len(text) <= 70 else text[:69] + "…")
    return frame[["family", "question", "expected", "before", "after"]].set_index("family")


def print_report(path: Path) -> None:
    """The table of the run at ``path`` on standard output; silent where the run has no report."""
    if not (path / REPORT).exists():
        return
    report = read_report(path)
    table(
        f"Exact match on {report['manifest']}:{report['split']}",
        ["family", "questions", "before %", "after %"],
        list(summary(report).itertuples()),
        right=["questions", "before %", "after %"],
    )
