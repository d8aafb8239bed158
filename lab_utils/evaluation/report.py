"""The report of an evaluation: asked for here, computed in a process of its own, read back, shown.

``report.json``, in the run's directory for its last checkpoint, has for each key of ``scores.KEYS`` a measure (see
``statistics``), or null and the reason in ``notes``; the same keys under ``base`` for the weights before training;
``by_mode``, ``win_rate``, ``samples``. docs/evaluation.md lists all of it.

Imports no torch: the kernel of a notebook stays free of devices.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.console import say, table
from lab_utils.errors import CheckpointError, DataError, LabError, RecipeError, RunError
from lab_utils.evaluation.tables import answers as answers
from lab_utils.evaluation.tables import by_mode, measures, summary
from lab_utils.evaluation.tables import figure as figure

if TYPE_CHECKING:
    import pandas as pd

    from lab_utils.evaluation.plan import Plan
    from lab_utils.runs.api import Run

REPORT, PAGE, LOG = "report.json", "samples.html", "evaluation.log"
VERSION = 2  # of the report's structure
PROGRESS = "· "
_ERRORS = {kind.exit_code: kind for kind in (RecipeError, DataError, CheckpointError, RunError)}


def evaluate(
    target: Run | Path | str,
    *,
    on: str | Sequence[str] = "ascent-tasks-prompts",
    split: str | None = None,
    limit: int | None = None,
    base: str | bool | None = None,
    against: str | None = None,
    judge: str = "exact",
    reference: str | None = None,
    modes: str | Sequence[str] | None = None,
    budget: int | str | dict[str, int] | None = None,
    samples: int = 4,
    k: str | Sequence[int] | None = None,
    temperature: float = 1.0,
    out: Path | str | None = None,
    accelerator: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Evaluate weights on held-out data, beside those that training started from.

    Args:
        target: a run, its name, prefix or path, ``last``; a checkpoint folder of a run; a model folder; base:NAME,
            preset:NAME, hf:ORG/NAME.
        on: manifests by name or path, each maybe with ``:SPLIT``. Questions from format prompt, perplexity from
            messages and text, accuracy on pairs from preference.
        split: where ``on`` names none; absent: test, or validation where there is no test.
        limit: at most this many rows of each manifest, spread over the families; absent: all.
        base: weights to compare with; absent: those that the target's run started from; False: none.
        against: another target, for the win rate.
        judge: of the win rate: exact (the verifiers), or a target that judges in words.
        reference: π_ref of ``reward_accuracy``; absent: the base.
        modes: of chat, thinking, max; the first gives the headline numbers. Absent: the run's own.
        budget: longest answer in tokens, one for all modes or by mode.
        samples: answers drawn for pass@k; 0: none.
        k: the k of pass@k; absent: 1 and ``samples``.
        temperature: of these answers.
        out: folder of report.json and samples.html; absent: the run's (a folder of it for an earlier checkpoint);
            nothing is kept for weights of no run.
        accelerator, dtype: device kind and working precision.
        seed: of sampling.
        progress: lines on standard error; absent: where that is a terminal.

    Returns:
        The report, and ``folder``: where it lies, None where nothing is kept.

    Raises:
        LabError: something does not exist or does not fit, before any weights are read; or the evaluation failed: its
            last line, and where the log is.
    """
    from lab_utils.evaluation.plan import make_plan

    plan = make_plan(
        str(getattr(target, "path", target)),
        on=on,
        split=split,
        base=base,
        against=against,
        judge=judge,
        reference=reference,
        modes=modes,
        budget=budget,
        samples=samples,
        k=k,
        temperature=temperature,
        limit=limit,
        accelerator=accelerator,
        dtype=dtype,
        seed=seed,
    )
    folder = Path(out) if out else plan.target.folder()
    progress = sys.stderr.isatty() if progress is None else progress
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="ascent-eval-") as temporary:
            return _run(plan, Path(temporary), progress, kept=False)
    return _run(plan, folder, progress, kept=True)


def _run(plan: Plan, folder: Path, progress: bool, kept: bool) -> dict[str, Any]:
    """The worker on a plan, its output in a log of the folder."""
    is_run = str(folder) == plan.target.run
    log = folder / "logs" / LOG if is_run else folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    last = "no output"
    with tempfile.TemporaryDirectory(prefix="ascent-plan-") as temporary, log.open("w") as sink:
        request = Path(temporary) / "plan.json"
        request.write_text(plan.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "lab_utils.evaluation.worker", str(request), str(folder)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            try:
                for line in process.stdout:
                    sink.write(line)
                    sink.flush()
                    last = line.strip() or last
                    if progress and line.startswith(PROGRESS):
                        say(line.removeprefix(PROGRESS).rstrip())
            except BaseException:
                process.terminate()  # an interrupted notebook must not leave a model answering
                raise
    if process.returncode:
        kind: type[LabError] = _ERRORS.get(process.returncode, RunError)
        where = f" (log: {log})" if kept else ""
        raise kind(f"Evaluating {plan.target.name} failed: {last.removeprefix('error: ')}{where}")
    if is_run:
        from lab_utils.runs import card

        card.refresh(folder)
    return read_report(folder) | {"folder": str(folder) if kept else None}


def read_report(path: Path) -> dict[str, Any]:
    """The report in a folder, usually a run's.

    Raises:
        RunError: there is none yet, or it was written by an earlier version.
    """
    try:
        report = json.loads((path / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path.name} has no {REPORT} yet: make one with lab eval {path.name}.") from None
    if report.get("version") != VERSION:
        raise RunError(
            f"{path / REPORT} was written by another version of Ascent (structure {report.get('version', 1)}, "
            f"expected {VERSION}): run lab eval {path.name} again."
        )
    return report


# -- showing ------------------------------------------------------------------------------------------------


def print_report(path: Path) -> None:
    """The tables of the report in a folder on standard output; silent where there is none."""
    if (path / REPORT).exists():
        show(read_report(path))


def show(report: dict[str, Any]) -> None:
    """The tables of a report on standard output."""
    sets = ", ".join(f"{m['name']}:{m['split']}" for m in report["manifests"])
    print(f"{report['target']['name']} on {sets}")
    _print("Measures", measures(report))
    if report["exact_match"]:
        _print("Exact match by family", summary(report))
    if report.get("by_mode"):
        _print("By reasoning mode", by_mode(report))
    if wins := report.get("win_rate"):
        counts = ", ".join(f"{wins[name]} {name}" for name in ("win", "tie", "loss"))
        print(f"against {wins['against']}, judged by {wins['judge']}: {counts}")
        if wins.get("without_verdict"):
            print(
                f"{100 * wins['without_verdict']:.0f} % of the judge's replies had no verdict and count as ties"
            )


def _print(title: str, frame: pd.DataFrame) -> None:
    columns = [frame.index.name, *frame.columns]
    table(title, columns, frame.fillna("–").itertuples(), right=columns[1:])
