"""``lab chips read | cost | energy`` and ``lab wandb workspace | sync | read``."""

from __future__ import annotations

import typer

from lab_utils.console import emit, say, table
from lab_utils.errors import RunError

chips = typer.Typer(
    help="What the chips do, what they took, and what watching them costs.", no_args_is_help=True
)
wandb = typer.Typer(help="The W&B dashboard, and offline runs brought to a server.", no_args_is_help=True)

KIND = typer.Option("auto", "--accelerator", help="auto, cpu, cuda or npu.")
RUN = typer.Argument("last", help="A run's name, unique prefix, path, or last.")
ROOT = typer.Option(None, "--runs", help="Folder of runs; default ASCENT_RUNS or ./runs.")
URL = typer.Option(None, "--url", help="The W&B server, as https://wandb.example.org.")
JSON = typer.Option(False, "--json", help="Print JSON.")


@chips.command("read")
def read_chips(accelerator: str = KIND, as_json: bool = JSON) -> None:
    """Every chip of this machine, once."""
    from lab_utils.registry import load
    from lab_utils.telemetry.chips import PROBES

    kind = _kind(accelerator)
    probe = load(PROBES, kind).make(None)
    try:
        rows = [reading.row() for reading in probe.read()]
    except Exception as error:  # drivers raise what they like
        raise RunError(f"{kind} chips cannot be read on this machine ({error}): see lab doctor.") from None
    columns = ["index", "name", "util", "used_mib", "total_mib", "power", "temp", "health"]
    lines = [[row.get(column, "") for column in columns] for row in rows]
    emit(rows, as_json, lambda: table(f"Chips ({kind})", columns, lines, right=columns[2:7]))


@chips.command("cost")
def cost(
    accelerator: str = KIND,
    samples: int = typer.Option(20, min=1, help="Samples to take."),
    interval: float = typer.Option(2.0, min=0.1, help="Seconds between samples of a run."),
    nodes: int = typer.Option(1, min=1, help="Nodes of the run; the others' files are copies on this disk."),
    as_json: bool = JSON,
) -> None:
    """What a sample costs the training process."""
    from lab_utils.telemetry.cost import measure

    found = measure(_kind(accelerator), samples=samples, interval=interval, nodes=nodes)
    rows = [
        ("a sample takes", f"{found['wall_ms']:.2f} ms"),
        (
            "of the interpreter",
            f"{found['cpu_ms']:.2f} ms, {100 * found['share']:.3f} % every {found['interval_s']:g} s",
        ),
        ("of other processes", f"{found['children_cpu_ms']:.2f} ms CPU"),
        (
            "longest pause of a busy thread",
            f"{found['pause_ms']:.1f} ms, {found['pause_without_ms']:.1f} without",
        ),
        ("a row", f"{found['bytes']:,.0f} bytes, {found['mib_a_day']:.1f} MiB a day"),
    ]
    title = f"Sampling {found['chips']} {found['accelerator']} chips, {found['nodes']} nodes"
    emit(found, as_json, lambda: table(title, ["", ""], rows))


@chips.command("energy")
def energy(run: str = RUN, root: str = ROOT, as_json: bool = JSON) -> None:
    """What a run's chips took, over all nodes and attempts."""
    from dataclasses import asdict

    from lab_utils.runs.api import attach
    from lab_utils.telemetry import chip_log

    found = attach(run, root)
    used = chip_log.energy(found.path)
    tokens = float(found.summary()["metrics"].get("train/num_tokens") or 0)
    result = {"run": found.name, **asdict(used), "joules_per_token": used.joules_per_token(tokens)}

    def render() -> None:
        if used.kwh is None:
            what = f"none of its {used.chips} chips says its power" if used.chips else "no samples of chips"
            say(f"{found.name}: {what}.")
            return
        rows = [
            ("energy", f"{used.kwh:.4g} kWh"),
            ("mean power", f"{used.watts_mean:,.0f} W, {used.chips} chips"),
            ("a token", f"{result['joules_per_token']:.4g} J" if tokens else "no token yet"),
            ("measured", f"{used.seconds:,.0f} s, {100 * used.covered:.1f} % of the run's time"),
        ]
        table(found.name, ["", ""], rows)

    emit(result, as_json, render)


def _kind(accelerator: str) -> str:
    from lab_utils.registry import members
    from lab_utils.telemetry.chips import PROBES, count
    from lab_utils.telemetry.cost import KINDS

    if accelerator == "auto":
        return next(kind for kind in KINDS if count(kind))
    if accelerator not in members(PROBES):
        raise RunError(f"--accelerator {accelerator}: expected auto, {', '.join(members(PROBES))}.")
    return accelerator


@wandb.command("workspace")
def workspace(
    save: bool = typer.Option(False, "--save", help="Put it on the server; else it is printed as JSON."),
    project: str = typer.Option("ascent", help="W&B project."),
    entity: str = typer.Option(None, help="W&B team or user; --save needs it."),
    url: str = URL,
    as_json: bool = JSON,
) -> None:
    """The dashboard made of panels/layout.py; printed, or put on a server."""
    from lab_utils.panels import workspace as dashboard

    if save:
        address = dashboard.save(project, entity, url)
        emit({"url": address}, as_json, lambda: print(address))
    else:
        emit(dashboard.as_json(dashboard.build(project, entity)), True)


@wandb.command("sync")
def sync(
    runs: list[str] = typer.Argument(None, help="Runs: names, unique prefixes, paths, or last."),
    every: bool = typer.Option(False, "--all", help="All runs that have offline W&B data."),
    url: str = URL,
    live: bool = typer.Option(False, "--live", help="Follow runs that still go on, to their end."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what would be sent."),
    jobs: int = typer.Option(4, "--jobs", min=1, help="Uploads side by side."),
    root: str = ROOT,
    as_json: bool = JSON,
) -> None:
    """Send offline W&B runs to a server, from a node that reaches it; what it has already is left out."""
    from lab_utils.runs.api import attach, list_runs
    from lab_utils.runs.directory import default_root
    from lab_utils.runs.states import FINAL
    from lab_utils.telemetry import wandb_server, wandb_sync
    from lab_utils.telemetry.wandb_reader import pieces

    if bool(runs) == every:
        raise RunError("lab wandb sync needs to know which runs: name some, or give --all.")
    found = (
        [run for run in list_runs(root) if pieces(run.path)] if every else [attach(run, root) for run in runs]
    )
    if not found:
        raise RunError(
            f"No run in {root or default_root()} has offline W&B data: name runs, or give their folder by --runs."
        )
    if without := [run.name for run in found if not pieces(run.path)]:
        raise RunError(f"{', '.join(without)}: no offline W&B data (tracking.wandb was disabled or online).")
    work = [
        wandb_sync.Job(
            run.path,
            wandb_server.server(url, run.recipe.tracking.base_url, run.name),
            lambda run=run: run.state not in FINAL,
        )
        for run in found
    ]
    if dry_run:
        rows = wandb_sync.plan(work)
    else:
        for address in sorted({job.url for job in work}):
            wandb_server.check(address)
        rows = wandb_sync.sync(work, parallel=jobs, live=live, say=say)
    columns = ["run", "piece", "bytes", "state", "error"]
    lines = [[f"{row['bytes']:,}" if c == "bytes" else row.get(c, "") for c in columns] for row in rows]
    emit(rows, as_json, lambda: table("W&B", columns, lines, right=["bytes"]))
    if failed := [row for row in rows if row["state"] == "failed"]:
        raise RunError(f"{len(failed)} of {len(rows)} pieces were not sent: the same command tries again.")


@wandb.command("read")
def read(run: str = RUN, root: str = ROOT, as_json: bool = JSON) -> None:
    """Read an offline W&B run by W&B's own tool and hold it against metrics.jsonl."""
    from lab_utils.runs.api import attach
    from lab_utils.telemetry.wandb_reader import compare

    result = compare(attach(run, root).path)

    def render() -> None:
        say(
            f"{result['run']}: {result['lines']} lines, {result['values']} values read back, {result['missing']} lost"
        )
        if result["differences"]:
            columns = ["step", "key", "metrics_jsonl", "wandb"]
            table("Differences", columns, [[d[c] for c in columns] for d in result["differences"][:50]])

    emit(result, as_json, render)
    if not result["equal"]:
        raise RunError(
            f"W&B and metrics.jsonl of {result['run']} differ in {len(result['differences'])} places."
        )
