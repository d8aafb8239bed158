"""``lab ascend check | selftest``."""

from __future__ import annotations

from pathlib import Path

import typer

from lab_utils.console import emit, say

app = typer.Typer(
    help="The Ascend path: proven without a chip (check), and on chips (selftest).", no_args_is_help=True
)


@app.command()
def check(
    only: list[str] = typer.Option([], "--only", help="One check by name; may be given several times."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Load the real torch_npu against a stand-in for CANN, and run operators, training steps and process groups on it.

    Needs no chip and no CANN: gcc, and the wheel that `make setup` put aside. Exit code 1 if a check failed.
    """
    from lab_utils.ascend.check import CHECKS, examine, show
    from lab_utils.errors import RecipeError
    from lab_utils.registry import members, nearest

    for name in only:
        if name not in members(CHECKS):
            raise RecipeError(f"--only {name}: there is no such check, {nearest(name, members(CHECKS))}")
    rows = examine(only or None, say)
    emit([row.as_dict() for row in rows], as_json, lambda: show(rows))
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


@app.command()
def selftest(
    device: str = typer.Option("npu", "--device", help="npu, or cpu to try the test itself; cuda works too."),
    minutes: float = typer.Option(10.0, "--minutes", min=0.0, help="Length of the burn-in; 0 leaves it out."),
    nproc: int = typer.Option(None, "--nproc", min=1, help="Ranks; absent: every device (cpu: 2)."),
    out: Path = typer.Option(None, "--out", help="The report, .md; its numbers go beside it as .json."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """On real chips: each operator against its definition, two steps of training against the CPU, a sweep of
    collectives, a burn-in; one report to send. Exit code 1 if a part failed."""
    from lab_utils.ascend.selftest import run

    report = run(device, minutes=minutes, nproc=nproc, out=out, say=say)
    emit(report.as_dict(), as_json, lambda: print(report.markdown(), end=""))
    say(f"report: {report.path}")
    if not report.ok:
        raise typer.Exit(1)
