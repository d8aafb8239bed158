"""``lab run`` and ``lab runs list | show | logs | stop | resume``."""

from __future__ import annotations

import contextlib

import typer

from lab_utils.console import emit, say, table
from lab_utils.errors import RunError

app = typer.Typer(help="Follow, stop and resume runs.", no_args_is_help=True)

RUN = typer.Argument("last", help="A run's name, unique prefix, path, or last.")
ROOT = typer.Option(None, "--runs", help="Folder of runs; default ASCENT_RUNS or ./runs.")
JSON = typer.Option(False, "--json", help="Print JSON.")
DETACH = typer.Option(False, "--detach", help="Return at once; the run goes on.")


def run_command(
    recipe: str = typer.Argument(help="A named recipe (lab recipe list) or a YAML file."),
    changes: list[str] = typer.Option([], "--set", help="A change, as in --set optim.lr=3e-4."),
    nproc: int = typer.Option(None, "--nproc", min=1, help="Ranks; the same as --set cluster.nproc=N."),
    detach: bool = DETACH,
    root: str = ROOT,
    as_json: bool = JSON,
) -> None:
    """Post-train a model. Ctrl-C saves a checkpoint and stops; with --detach the run goes on by itself."""
    from lab_utils.recipe import Recipe, parse_changes
    from lab_utils.runs.api import launch

    resolved = Recipe.load(recipe).with_changes(parse_changes(changes))
    if nproc is not None:
        resolved = resolved.with_changes({"cluster.nproc": nproc})
    _follow(launch(resolved, root=root), detach, as_json)


def _follow(run, detach: bool, as_json: bool) -> None:  # a Run, imported late
    if detach:
        emit({"run": run.name, "path": str(run.path), "state": run.state}, as_json, lambda: print(run.name))
        return
    say(f"run directory  {run.path}")
    try:
        run.wait(progress=not as_json)
    except KeyboardInterrupt:
        say(f"\nsaving a checkpoint and stopping {run.name}; press Ctrl-C again to leave it to itself")
        with contextlib.suppress(RunError):  # it ended in this very moment
            run.stop(checkpoint=True, wait=0)
        try:
            run.wait(progress=not as_json)
        except KeyboardInterrupt:
            say(f"left: {run.name} saves and stops by itself (lab runs show {run.name})")
            raise
        say(f"go on with: lab runs resume {run.name}")
    _show(run, as_json)


@app.command("list")
def list_command(root: str = ROOT, as_json: bool = JSON) -> None:
    """All runs, newest first."""
    import time

    from lab_utils.runs.api import list_runs

    found = [run.summary() for run in list_runs(root)]

    def line(row: dict) -> tuple:
        loss, speed = row["metrics"].get("train/loss"), row["metrics"].get("perf/tokens_per_s")
        return (
            row["run"],
            row["state"],
            f"{row['step']}/{row['total_steps']}",
            "" if loss is None else f"{float(loss):.4g}",
            "" if speed is None else f"{float(speed):,.0f}",
            "" if not row["created"] else f"{(time.time() - row['created']) / 3600:.1f} h",
            row["error"] or "",
        )

    columns = ["run", "state", "step", "loss", "tokens/s", "age", "error"]
    emit(
        found,
        as_json,
        lambda: table("Runs", columns, map(line, found), right=["step", "loss", "tokens/s", "age"]),
    )


@app.command("show")
def show(run: str = RUN, root: str = ROOT, as_json: bool = JSON) -> None:
    """State, step and last metrics of a run."""
    from lab_utils.runs.api import attach

    _show(attach(run, root), as_json)


def _show(run, as_json: bool) -> None:  # a Run, imported late
    from lab_utils.telemetry.names import lookup

    summary = run.summary()

    def render() -> None:
        head = {key: value for key, value in summary.items() if key != "metrics" and value not in (None, [])}
        head["step"] = f"{head.pop('step')} of {head.pop('total_steps')}"
        table(summary["run"], ["", ""], [(key, value) for key, value in head.items()])
        rows = []
        for key, value in summary["metrics"].items():
            spec = lookup(key)
            rows.append((key, f"{float(value):.6g}", spec.unit if spec else "", spec.meaning if spec else ""))
        if rows:
            table("Last values", ["metric", "value", "unit", "meaning"], rows, right=["value"])

    emit(summary, as_json, render)


@app.command("logs")
def logs(
    run: str = RUN,
    lines: int = typer.Option(50, "-n", "--lines", min=1, help="Lines of each log."),
    rank: int = typer.Option(None, "--rank", min=0, help="One rank's log alone."),
    root: str = ROOT,
    as_json: bool = JSON,
) -> None:
    """The end of a run's logs."""
    from lab_utils.runs.api import attach

    found = attach(run, root)
    text = found.logs(lines, rank)
    if not text:
        what = "logs" if rank is None else f"log of rank {rank}"
        raise RunError(f"{found.name} has no {what} yet: see {found.path}/logs.")
    emit({"run": found.name, "logs": text.splitlines()}, as_json, lambda: print(text))


@app.command("stop")
def stop(
    run: str = RUN,
    checkpoint: bool = typer.Option(True, help="Save a checkpoint first."),
    detach: bool = DETACH,
    root: str = ROOT,
    as_json: bool = JSON,
) -> None:
    """End a run at its next step, after a checkpoint."""
    from lab_utils.runs.api import attach

    found = attach(run, root).stop(checkpoint=checkpoint, wait=0 if detach else None)
    state = found.state
    emit({"run": found.name, "state": state}, as_json, lambda: print(f"{found.name}: {state}"))


@app.command("resume")
def resume(
    run: str = RUN,
    changes: list[str] = typer.Option([], "--set", help="Another layout, as in --set parallel.pp=2."),
    nproc: int = typer.Option(None, "--nproc", min=1, help="Ranks; the same as --set cluster.nproc=N."),
    detach: bool = DETACH,
    root: str = ROOT,
    as_json: bool = JSON,
) -> None:
    """Go on from a run's last complete checkpoint, under another layout if wanted."""
    from lab_utils.recipe import parse_changes
    from lab_utils.runs.api import attach

    wanted = {**parse_changes(changes), **({"cluster.nproc": nproc} if nproc is not None else {})}
    _follow(attach(run, root).resume(wanted), detach, as_json)
