"""``lab audit`` and ``lab export``."""

from __future__ import annotations

import typer


def audit(
    run: str = typer.Argument(help="Name, unique prefix or path of a run, or 'last'."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
    all_tensors: bool = typer.Option(False, "--all", help="List every tensor, not only the extremes."),
) -> None:
    """Measure which tensors training changed, and by how much: audit.json, and a line in the run card."""
    from lab_utils.console import emit
    from lab_utils.engine.audit import audit as measure
    from lab_utils.runs.directory import find

    report = measure(find(run))
    emit(report, json, lambda: _show(report, all_tensors))


def export(
    run: str = typer.Argument(help="Name, unique prefix or path of a run, or 'last'."),
    folder: str = typer.Argument(help="New or empty folder."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Write the newest checkpoint as a folder that transformers loads."""
    from lab_utils.console import emit
    from lab_utils.engine.export import export as write
    from lab_utils.runs.directory import find

    report = write(find(run), folder)
    emit(
        report,
        json,
        lambda: typer.echo(f"{report['path']}: {report['bytes'] / 2**20:.1f} MiB, {report['checkpoint']}"),
    )


def _show(report: dict, all_tensors: bool) -> None:
    from lab_utils.console import table

    rows = sorted(report["by_tensor"], key=lambda row: row["relative_change"])
    shown = rows if all_tensors or len(rows) <= 12 else [*rows[:6], *rows[-6:]]
    table(
        f"{report['run']} · {report['checkpoint']}: {report['changed']} of {report['tensors']} tensors changed",
        ("tensor", "shape", "relative change"),
        [
            (row["name"], "×".join(map(str, row["shape"])) or "scalar", f"{row['relative_change']:.2e}")
            for row in shown
        ],
        right=("relative change",),
    )
    for name in report["unchanged"]:
        typer.echo(f"unchanged: {name}")
    if report["indexer_changed"] is not None:
        typer.echo(
            f"indexer: {'every tensor changed' if report['indexer_changed'] else 'NOT every tensor changed'}"
        )
    for row in report["buffers"]:
        if row["changed"]:
            typer.echo(f"buffer changed: {row['name']} by {row['relative_change']:.2e}")
