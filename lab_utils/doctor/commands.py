"""``lab doctor``."""

from __future__ import annotations

import typer

from lab_utils.console import emit


def doctor(
    peers: list[str] = typer.Option(
        [], "--peer", help="Another node, HOST or HOST:PORT, that must be reachable."
    ),
    quick: bool = typer.Option(
        False, "--quick", help="Leave out what takes seconds: imports of torch, disk speed."
    ),
    runs: str = typer.Option(None, "--runs", help="Folder of runs; default ASCENT_RUNS or ./runs."),
    measure: bool = typer.Option(
        False, "--measure", help="Measure this machine for lab plan --cluster local."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check this machine: versions, CANN, driver, chips, network, file system, W&B, Jupyter, Slurm. Exit code 1 if a
    check failed."""
    from lab_utils.doctor import examine, show

    if measure:
        from lab_utils.planner.measure import run as measure_machine

        measure_machine(as_json)
        return
    rows = examine(runs=runs, peers=peers, quick=quick)
    emit([row.as_dict() for row in rows], as_json, lambda: show(rows))
    if any(row.ok is False for row in rows):
        raise typer.Exit(1)
