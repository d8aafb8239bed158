"""``lab model``: what models there are and what they cost."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Models: presets, shipped weights, sizes and FLOPs.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """Sources that need nothing but this project."""
    from lab_utils.console import emit
    from lab_utils.models.load import SHIPPED
    from lab_utils.models.presets import presets

    shipped = sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.exists() else []
    rows = [{"source": f"base:{name}", "weights": "shipped"} for name in shipped]
    rows += [{"source": f"preset:{name}", "weights": "random"} for name in presets()]
    emit(rows, as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Preset name, or a source: base:, preset:, hf:, or a folder.")],
    length: Annotated[int, typer.Option(help="Document length that the FLOPs are for.")] = 4096,
    as_json: Json = False,
) -> None:
    """Parameters by component, active parameters and training FLOPs per token."""
    from lab_utils.console import emit
    from lab_utils.models.load import describe
    from lab_utils.models.presets import presets

    emit(describe(f"preset:{name}" if name in presets() else name, length), as_json)


@app.command()
def optimizer(
    name: Annotated[str, typer.Argument(help="Preset name, or a source: base:, preset:, hf:, or a folder.")],
    mtp: Annotated[bool, typer.Option("--mtp", help="With the blocks of multi-token prediction.")] = False,
    as_json: Json = False,
) -> None:
    """What Muon trains and what AdamW: matrices and parameters by name, for optim.kind=muon."""
    from lab_utils.console import emit, say, table
    from lab_utils.models.load import load_config
    from lab_utils.models.presets import presets
    from lab_utils.optim.table import assignment_table, shapes_of, totals
    from lab_utils.recipe import OptimSection

    config = load_config(f"preset:{name}" if name in presets() else name)
    rows = assignment_table(shapes_of(config, mtp=mtp), config, OptimSection(kind="muon"))
    found = totals(rows)

    def render() -> None:
        columns = ("name", "optimizer", "shape", "count", "parameters")
        lines = (
            (
                r["name"],
                r["algorithm"],
                " × ".join(map(str, r["shape"])),
                f"{r['count']:,}",
                f"{r['parameters']:,}",
            )
            for r in rows
        )
        table(f"Optimizers of {name}", columns, lines, right=columns[2:])
        say(
            f"Muon {found['muon']:,} parameters (4 bytes of state each), AdamW {found['adamw']:,} (8 bytes each): "
            f"{found['state_bytes']:,} bytes."
        )

    emit({"rows": rows, **found}, as_json, render)
