"""``lab kernels check | bench``: the device operators against their definitions, and their speed beside them."""

from __future__ import annotations

import os
from contextlib import contextmanager

import typer

from lab_utils.console import emit, say, table

app = typer.Typer(help="The device operators: are they right, and how fast are they.", no_args_is_help=True)

OPERATOR = typer.Option(None, "--operator", help="Only this one; may be given several times.")
DEVICE = typer.Option("cpu", "--device", help="cpu, cuda or npu.")
JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command()
def check(
    operator: list[str] = OPERATOR,
    device: str = DEVICE,
    seeds: int = typer.Option(3, min=1, help="Random shapes and numbers of each variant of an operator."),
    as_json: bool = JSON,
) -> None:
    """Values and gradients of every implementation against its reference, on random inputs; exit code 1 if one is
    wrong."""
    _start(device)
    from kernels.conformance import CHECKED, TOLERANCE, short
    from kernels.conformance import check as compare_all

    with _one_sentence():
        rows = compare_all(operator or None, device, seeds, say)

    def cell(error: float | None) -> str:
        return "" if error is None else format(error, ".1e")

    allowed = ", ".join(f"{TOLERANCE[dtype]:g} in {short(dtype)}" for dtype in CHECKED)
    title = f"Largest error, as a share of the reference's largest number; allowed: {allowed}, none in codes"
    columns = ["operator", "implementation", "device", "dtype", "forward", "gradient", "ok"]
    drawn = [
        (
            row["operator"],
            row["implementation"],
            row["device"],
            row["dtype"],
            cell(row["forward_error"]),
            cell(row["gradient_error"]),
            "yes" if row["ok"] else "NO",
        )
        for row in rows
    ]
    emit(rows, as_json, lambda: table(title, columns, drawn, right=("forward", "gradient")))
    wrong = sum(not row["ok"] for row in rows)
    if wrong:
        say(f"{wrong} of {len(rows)} comparisons are not ok.")
        raise typer.Exit(1)


@app.command()
def bench(
    operator: list[str] = OPERATOR,
    device: str = DEVICE,
    threads: int = typer.Option(None, min=1, help="CPU threads; absent: as torch has them."),
    as_json: bool = JSON,
) -> None:
    """Forward and backward of every implementation at one realistic size, beside its reference."""
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # torch reads it once, or its profiler writes to the terminal
    _start(device, threads)
    import torch

    from kernels.speed import bench as time_all

    with _one_sentence():
        rows = time_all(operator or None, device, lambda row: say(f"measured {row['operator']}"))

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    columns = [
        "operator",
        "implementation",
        "dtype",
        "shape",
        "ms",
        "reference ms",
        "ratio",
        "GFLOP/s",
        "GB/s",
        "MiB",
    ]
    drawn = [
        (
            row["operator"],
            row["implementation"],
            row["dtype"],
            row["shape"],
            cell(row["ms"], ".2f"),
            cell(row["reference_ms"], ".2f"),
            cell(row["ratio"], ".2f"),
            cell(row["gflops"], ",.0f"),
            cell(row["gbps"], ".1f"),
            cell(row["peak_mib"], ",.1f"),
        )
        for row in rows
    ]
    place = f"cpu, {torch.get_num_threads()} threads" if device == "cpu" else device
    title = f"Forward and backward on {place}; ratio above 1: faster than the reference"
    emit(rows, as_json, lambda: table(title, columns, drawn, right=columns[4:]))


def _start(device: str, threads: int | None = None) -> None:
    """Bind the process to its device, as a training process does.

    Raises:
        LayoutError: no such kind of device, or none on this machine.
    """
    from lab_utils.accelerators import accelerator_class
    from lab_utils.errors import LayoutError

    kind = accelerator_class(device)
    if not kind.available():
        raise LayoutError(
            f"--device {device}: this machine has no {device} device; run it where there is one."
        )
    import torch

    kind().setup(threads=threads or torch.get_num_threads())


@contextmanager
def _one_sentence():
    """What ``kernels`` raises about a name, as the user's error."""
    from lab_utils.errors import RecipeError

    try:
        yield
    except ValueError as error:
        raise RecipeError(str(error)) from error
