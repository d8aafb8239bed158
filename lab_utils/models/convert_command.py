"""``lab convert``: a DeepSeek-V4 checkpoint from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder, or hf:ORG/NAME.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must not exist.")],
    to: Annotated[
        str,
        typer.Option(help="bf16, fp32 (transformers' layout), fp8, fp8+mxfp4 or base (DeepSeek's names)."),
    ],
    like: Annotated[
        str | None,
        typer.Option(
            help="Quantised checkpoint the model descends from: keep its scales where they are exact."
        ),
    ] = None,
    official_names: Annotated[
        bool, typer.Option("--official-names", help="DeepSeek's names for bf16 and fp32 too.")
    ] = False,
    shard_gb: Annotated[float, typer.Option(help="Size of the files, in GB.", min=0.001)] = 5.0,
    workers: Annotated[int, typer.Option(help="Processes, each at one file.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert a DeepSeek-V4 checkpoint; a killed conversion goes on when the same command runs again."""
    from lab_utils.console import emit, say
    from lab_utils.models.deepseek_v4.formats.convert import convert as run
    from lab_utils.models.load import checkpoint_folder

    told = run(
        checkpoint_folder(source),
        destination,
        to,
        official_names=official_names,
        like=checkpoint_folder(like) if like else None,
        shard_gb=shard_gb,
        workers=workers,
    )

    def render() -> None:
        say(
            f"{told['destination']}: {told['from']} to {told['to']}, {told['tensors']} tensors, "
            f"{told['bytes'] / 1e9:.2f} GB in {told['files']} files, {told['seconds']:.0f} s"
        )
        if told["blocks"]:
            say(
                f"scales: {told['kept']} of {told['blocks']} blocks kept those of the checkpoint they came from"
            )
        for name in told["skipped"]:
            say(f"left out: {name}, a copy of the main model's")

    emit(told, as_json, render)
