"""``lab eval RUN``."""

from __future__ import annotations

import typer

from lab_utils.console import emit


def evaluate(
    run: str = typer.Argument("last", help="A run's name, unique prefix, path, or last."),
    on: str = typer.Option("ascent-tasks-prompts", "--on", help="Manifest of format prompt."),
    split: str = typer.Option("test", "--split", help="Split of the manifest."),
    limit: int = typer.Option(None, "--limit", min=1, help="At most this many questions."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Answers before and after training, checked exactly; writes report.json into the run directory."""
    from lab_utils.evaluation.report import evaluate as evaluate_run
    from lab_utils.evaluation.report import print_report
    from lab_utils.runs.directory import find

    path = find(run).path
    report = evaluate_run(path, on=on, split=split, limit=limit)
    emit(report, as_json, lambda: print_report(path))
