"""``lab run`` and ``lab runs list | show | logs | stop | resume``."""

from __future__ import annotations

import contextlib

import typer

from lab_utils.console import emit, say, table
from lab_utils.errors import RunError
from lab_utils.runs.states import ACTIVE

app = typer.Typer(help="Follow, stop and resume runs.", no_args_is_help=True)

RUN = typer.Argument("last", help="A run's name, unique prefix, path, or last.")
ROOT = typer.Option(None, "--runs", help="Folder of runs; default ASCENT_RUNS or ./runs.")
JSON = typer.Option(False, "--json", help="Print JSON.")
LAUNCHER = typer.Option(
    None, "--launcher", help="local, slurm or volcano; the same as --set cluster.launcher=NAME."
)
NODES = typer.Option(None, "--nodes", min=1, help="Machines; the same as --set cluster.nodes=N.")
NPROC = typer.Option(None, "--nproc", min=1, help="Ranks a node; the same as --set cluster.nproc=N.")
DETACH = typer.Option(False, "--detach", help="Return at once; the run goes on.")


def run_command(
    recipe: str = typer.Argument(help="A named recipe (lab recipe list) or a YAML file."),
    changes: list[str] = typer.Option([], "--set", help="A change, as in --set optim.lr=3e-4."),
    launcher: str = LAUNCHER,
    nodes: int = NODES,
    nproc: int = NPROC,
    detach: bool = DETACH,
    root: str = ROOT,
    as_json: bool = JSON,
) -> None:
    """Post-train a model. Ctrl-C saves a checkpoint and stops; with --detach the run goes on by itself."""
    from lab_utils.launchers._commands import changed
    from lab_utils.runs.api import launch

    _follow(launch(changed(recipe, changes, launcher, nodes, nproc), root=root), detach, as_json)


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
        if summary["state"] in ACTIVE:
            head |= run.job().words()
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
    launcher: str = LAUNCHER,
    nodes: int = NODES,
    nproc: int = NPROC,
    detach: bool = DETACH,
    root: str = ROOT,
    as_json: bool = JSON,
) -> None:
    """Go on from a run's last complete checkpoint, under another layout if wanted."""
    from lab_utils.launchers._commands import places
    from lab_utils.recipe import parse_changes
    from lab_utils.runs.api import attach

    wanted = {**parse_changes(changes), **places(launcher, nodes, nproc)}
    _follow(attach(run, root).resume(wanted), detach, as_json)


@app.command("fork")
def fork(
    run: str = RUN,
    changes: list[str] = typer.Option([], "--set", help="A change, as in --set optim.lr=1e-3."),
    weights: bool = typer.Option(False, "--weights", help="Start from the run's newest checkpoint."),
    detach: bool = DETACH,
    root: str = ROOT,
    as_json: bool = JSON,
) -> None:
    """A new run of a run's recipe with changes."""
    from lab_utils.recipe import parse_changes
    from lab_utils.runs.api import attach, launch

    recipe = attach(run, root).fork(parse_changes(changes), weights=weights)
    _follow(launch(recipe, root=root), detach, as_json)


@app.command("delete")
def delete(
    run: str = typer.Argument(help="A run's name, unique prefix or path."),
    yes: bool = typer.Option(False, "--yes", help="Don't ask."),
    root: str = ROOT,
    as_json: bool = JSON,
) -> None:
    """Remove a run that has ended, with its checkpoints."""
    from lab_utils.runs.api import attach

    found = attach(run, root)
    if not yes and not typer.confirm(
        f"Remove {found.path} with {len(found.directory.checkpoints())} checkpoints?"
    ):
        raise RunError(f"{found.name} is kept.")
    found.delete()
    emit({"run": found.name, "deleted": True}, as_json, lambda: print(f"{found.name}: deleted"))


@app.command("note")
def note(
    run: str = RUN,
    text: str = typer.Option(None, "--text", help="A note; empty takes it away."),
    tags: str = typer.Option(None, "--tags", help="Words, separated by commas; empty takes them away."),
    root: str = ROOT,
    as_json: bool = JSON,
) -> None:
    """Write a note or tags at a run; without options, show them."""
    from lab_utils.runs.api import attach

    found = attach(run, root)
    if text is not None:
        found.notes = text
    if tags is not None:
        found.tags = tags
    written = {"run": found.name, "note": found.notes, "tags": list(found.tags)}
    emit(written, as_json, lambda: print(f"{found.name}  {' '.join(found.tags)}\n{found.notes}".rstrip()))


@app.command("compare")
def compare_command(
    runs: list[str] = typer.Argument(help="Two runs or more."), root: str = ROOT, as_json: bool = JSON
) -> None:
    """Runs beside one another: settings that differ, last metrics, answers."""
    from lab_utils.runs.api import attach
    from lab_utils.runs.compare import compare

    frame = compare([attach(run, root) for run in runs])
    by_key = frame.T.astype(object).where(frame.T.notna(), None)

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

    rows = [(key, *map(cell, row)) for key, row in zip(by_key.index, by_key.values.tolist())]
    emit(
        {name: by_key[name].to_dict() for name in by_key},
        as_json,
        lambda: table("Runs compared", ["", *by_key.columns], rows, right=list(by_key.columns)),
    )
