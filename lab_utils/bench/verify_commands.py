"""``lab verify layouts``: that a layout changes speed and not loss, on the machine or cluster where it is asked."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lab_utils.console import emit, say, table

app = typer.Typer(help="Proofs to run on one's own machine.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Proofs to run on one's own machine."""


@app.command()
def layouts(
    nproc: Annotated[int, typer.Option(min=1, help="Ranks.")] = 8,
    layouts: Annotated[str, typer.Option(help="Names as dp4_ep2_pp2 or dp4_ep2_pp2_v2; absent: all.")] = "",
    optimizers: Annotated[str, typer.Option(help="adamw, muon, or both.")] = "adamw,muon",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 20,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda or npu.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A small DeepSeek-V4 of every layer kind under each layout, beside one process that knows of no ranks."""
    from lab_utils.bench.layouts import chosen_layouts, verify_layouts

    wanted = [name for name in layouts.split(",") if name]
    say(f"{len(chosen_layouts(nproc, wanted))} layouts of {nproc} ranks, {steps} steps each")
    rows = verify_layouts(
        nproc,
        layouts=wanted,
        optimizers=optimizers.split(","),
        dtype=dtype,
        steps=steps,
        accelerator=accelerator,
    )
    columns = ["layout", "optimizer", "loss", "parameters", "gradients", "indexer", "changed", "ok"]
    drawn = [
        (
            row["layout"],
            row["optimizer"],
            *(f"{row[f'max_{what}_error']:.1e}" for what in ("loss", "parameter", "gradient", "indexer")),
            f"{row['changed']}/{row['tensors']}",
            "yes" if row["ok"] else "NO",
        )
        for row in rows
    ]
    title = f"Largest relative errors against one process, {dtype}, {steps} steps"
    emit(rows, as_json, lambda: table(title, columns, drawn, right=columns[2:7]))
    if not all(row["ok"] for row in rows):
        sys.exit(1)


@app.command()
def shards(
    name: Annotated[str, typer.Argument(help="Preset name, or a source: base:, preset:, hf:, or a folder.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the job.")] = 2048,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel degree.")] = 64,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 16,
    virtual_stages: Annotated[int, typer.Option(min=1, help="Runs of layers that each stage holds.")] = 1,
    mtp: Annotated[bool, typer.Option(help="With the blocks of multi-token prediction.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What the ranks of each stage hold, cut by the engine's own policy without memory; the sum is the model."""
    from lab_utils.bench.layouts import shards_of
    from lab_utils.models.presets import presets

    degrees = {"ep": ep, "pp": pp, "virtual_stages": virtual_stages}
    told = shards_of(f"preset:{name}" if name in presets() else name, ranks, degrees, mtp)
    columns = ["stage", "layers", "dense of a rank", "experts of a rank", "experts of an ep group"]
    drawn = [
        (
            str(row["stage"]),
            ", ".join(f"{start}–{stop - 1}" for start, stop in row["layers"] or []) or "all",
            f"{row['dense']:,}",
            f"{row['experts']:,}",
            f"{row['all_experts']:,}",
        )
        for row in told["stages"]
    ]

    def render() -> None:
        table(f"{name} on {ranks} ranks: ep {ep}, pp {pp}", columns, drawn, right=columns[2:])
        say(f"{told['parameters']:,} parameters in all, {told['mtp']:,} of them multi-token prediction's")

    emit(told, as_json, render)
