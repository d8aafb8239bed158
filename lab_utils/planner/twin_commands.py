"""``lab twin``: the engine's own step on a rank of a job of any size, without the job. Runs in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Annotated, Any

import typer


def twin(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a YAML file.")],
    chips: Annotated[
        int, typer.Option(min=1, help="Chips as the cluster counts them (a 910C is two devices).")
    ],
    rank: Annotated[
        list[int] | None, typer.Option(help="Rank to run; several are checked with one another.")
    ] = None,
    all_stages: Annotated[bool, typer.Option("--all-stages", help="A rank of every pipeline stage.")] = False,
    cluster: Annotated[
        str, typer.Option(help="Name or file of a cluster: devices, their memory.")
    ] = "ascend-910c",
    device_gib: Annotated[
        float | None, typer.Option(help="Memory of a device; absent: the cluster's.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Way through the model: npu, cpu; absent: by the cluster.")
    ] = "",
    tensors: Annotated[int, typer.Option(min=0, help="So many of the largest blocks at the peak.")] = 0,
    order: Annotated[bool, typer.Option("--order", help="With --json: every collective in order.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change of the recipe, KEY=VALUE.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a whole step of one rank of N chips without a chip: memory at its peak, collectives, FLOPs."""
    from lab_utils.console import emit
    from lab_utils.errors import LayoutError
    from lab_utils.planner.auto import fastest
    from lab_utils.planner.cluster import find
    from lab_utils.recipe import Recipe, parse_changes

    where, changes = find(cluster), list(set_ or [])
    spec = Recipe.load(recipe).with_changes(parse_changes(changes))
    ranks = where.devices(chips)
    if spec.parallel.auto:
        layout = fastest(spec, where, ranks)
        changes += [f"{key}={json.dumps(value)}" for key, value in layout.items()]
        spec = spec.with_changes(layout)
    spec.layout(ranks)
    chosen = (
        [stage * spec.parallel.ep for stage in range(spec.parallel.pp)] if all_stages else list(rank or [0])
    )
    way = device or ("cpu" if where.kind == "cpu" else "npu")
    told = _child(recipe, changes, ranks, chosen, way, tensors, order)
    reports = told.get("twins", [told])
    for report in reports:
        _judge(report, spec, ranks, where, device_gib)
    result = {**told, "fits": all(r["fits"] for r in reports)} if "twins" in told else told
    emit(result, as_json, lambda: _show(reports, told.get("mismatches", [])))
    worst = max(reports, key=lambda r: r["exceeds_gib"])
    if not worst["fits"]:
        raise LayoutError(
            f"Rank {worst['rank']} (stage {worst['stage']}) needs {_need(worst):.1f} GiB of a device's "
            f"{worst['device_gib']:g}, {worst['exceeds_gib']:.1f} more than there is; its largest part is "
            f"{_largest(worst)}: change model.checkpointing, parallel, data.row_tokens or the number of chips."
        )
    if told.get("mismatches"):
        raise LayoutError(told["mismatches"][0])


def _child(
    recipe: str, changes: list[str], ranks: int, chosen: list[int], device: str, tensors: int, order: bool
) -> dict[str, Any]:
    """The report of ``python -m lab_utils.engine.twin``; its progress goes to standard error as it comes.

    Raises:
        LayoutError: it refused; its own sentence.
    """
    from lab_utils.errors import LayoutError

    command = [
        sys.executable,
        "-m",
        "lab_utils.engine.twin",
        recipe,
        f"--ranks={ranks}",
        f"--device={device}",
    ]
    command += [f"--rank={r}" for r in chosen] + [f"--set={change}" for change in changes]
    command += [f"--tensors={tensors}"] if tensors else []
    command += ["--order"] if order else []
    lines: list[str] = []
    with tempfile.TemporaryFile("w+") as report:
        with subprocess.Popen(command, stdout=report, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stderr:
                lines.append(line.rstrip())
                if line.startswith("rank ") and len(chosen) > 1:
                    print(line.rstrip(), file=sys.stderr, flush=True)
        report.seek(0)
        out = report.read()
    if process.returncode and not out.strip():
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        last = said or [line for line in lines if line.strip()][-1:] or ["killed"]
        raise LayoutError(f"{last[0]}" if said else f"The twin of {recipe} ended early: {last[0]}")
    return json.loads(out.strip().splitlines()[-1])


def _judge(report: dict[str, Any], recipe: Any, ranks: int, cluster: Any, device_gib: float | None) -> None:
    """Add to a report: whether its device holds it with what no tensor shows, and how far the planner is off."""
    from lab_utils.planner.memory import stage_memory

    stage = stage_memory(recipe, ranks, cluster=cluster)[report["stage"]]
    unseen = {name: stage.terms[name] for name in ("communicators", "runtime", "slack")}
    device = cluster.device.memory_gib.value if device_gib is None else device_gib
    seen, peak = stage.seen_by_twin, report["memory_peak_gib"]
    report["planner_error"] = seen / peak - 1
    report["planner_by_kind_gib"] = {kind: stage.terms[kind] for kind in report["memory_by_kind_gib"]}
    report["unseen_gib"] = unseen
    report["device_gib"] = device
    report["exceeds_gib"] = max(0.0, peak + sum(unseen.values()) - device)
    report["fits"] = not report["exceeds_gib"]


def _need(report: dict[str, Any]) -> float:
    return report["memory_peak_gib"] + sum(report["unseen_gib"].values())


def _largest(report: dict[str, Any]) -> str:
    kind, size = max(report["memory_by_kind_gib"].items(), key=lambda item: item[1])
    return f"{kind} with {size:.1f} GiB"


def _show(reports: list[dict[str, Any]], mismatches: list[str]) -> None:
    from lab_utils.console import table

    kinds = list(reports[0]["memory_by_kind_gib"])
    table(
        f"Memory at the peak, GiB of a device's {reports[0]['device_gib']:g}",
        ("rank", "stage", *kinds, "peak", "planner", "unseen", "fits"),
        [
            (
                r["rank"],
                r["stage"],
                *(f"{r['memory_by_kind_gib'][kind]:.2f}" for kind in kinds),
                f"{r['memory_peak_gib']:.2f}",
                f"{100 * r['planner_error']:+.1f} %",
                f"{sum(r['unseen_gib'].values()):.2f}",
                "yes" if r["fits"] else "NO",
            )
            for r in reports
        ],
        right=("rank", "stage", *kinds, "peak", "planner", "unseen"),
    )
    first = reports[0]
    table(
        f"Collectives of rank {first['rank']}, in the order of the first of each",
        ("kind", "group", "ranks", "dtype", "calls", "MiB handed in"),
        [
            (c["kind"], c["group"], c["group_size"], c["dtype"], c["count"], f"{c['bytes'] / 2**20:,.1f}")
            for c in first["collectives"]
        ],
        right=("ranks", "calls", "MiB handed in"),
    )
    for tensor in first.get("tensors", []):
        shape = "×".join(map(str, tensor["shape"])) or "scalar"
        typer.echo(f"{tensor['gib']:8.3f} GiB  {tensor['kind']:<12} {shape:<24} {tensor['what']}")
    typer.echo(
        f"rank {first['rank']}: {first['flops'] / 1e12:,.2f} TFLOP of products in {first['micro_batches']} "
        f"micro-batches, {first['flops_model'] / 1e12:,.2f} by the closed form without recomputation"
    )
    for sentence in mismatches:
        typer.echo(f"MISMATCH: {sentence}")
    if len(reports) > 1 and not mismatches:
        typer.echo(f"{len(reports)} ranks ask the same of one another, in the same order.")
