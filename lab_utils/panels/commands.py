"""``lab notebook NAME -p key value``."""

from __future__ import annotations

import typer

from lab_utils.console import emit, say


def notebook(
    context: typer.Context,
    name: str = typer.Argument(help="A notebook of notebooks/ without its ending, or a path."),
    runs: str = typer.Option(None, "--runs", help="Folder of runs; default ASCENT_RUNS or ./runs."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Execute a notebook: lab notebook 10_sft -p steps 50 -p nproc 2. The executed copy stays with its run."""
    from pathlib import Path

    from lab_utils.evaluation.report import print_report
    from lab_utils.panels.notebooks import execute, parse_parameters
    from lab_utils.runs.directory import default_root

    root = Path(runs) if runs else default_root()
    result = execute(name, parse_parameters(context.args), root=root, progress=not as_json)

    def render() -> None:
        for run in result["runs"]:
            print_report(Path(run))
            print(f"run directory  {run}")
        print(f"notebook       {result['notebook']}")
        say(f"done in {result['seconds'] / 60:.1f} minutes")

    emit(result, as_json, render)


notebook.context_settings = {"allow_extra_args": True, "ignore_unknown_options": True}
