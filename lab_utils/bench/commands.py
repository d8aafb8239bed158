"""``lab bench …``: comparisons with a peer, side by side in one process chain, as ratios."""

from __future__ import annotations

from pathlib import Path

import typer

from lab_utils.console import emit, say, table

app = typer.Typer(help="Side-by-side measurements against a peer.", no_args_is_help=True)


@app.command()
def step(
    preset: str = typer.Option("reference", help="A model preset."),
    shapes: str = typer.Option(
        "8x256,2x1024,1x2048,1x4096,1x8192", help="Rows × tokens, separated by commas."
    ),
    limit_gib: float = typer.Option(16.0, help="Memory each process may use, GiB."),
    threads: int = typer.Option(None, min=1, help="CPU threads; absent: all cores."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    dtype: str = typer.Option("float32", help="float32 or bfloat16."),
    peer: bool = typer.Option(True, help="Measure transformers beside ours."),
    rounds: int = typer.Option(1, min=1, help="How often both are measured in turn."),
    allocator: str = typer.Option(
        "system", help="system: glibc as it comes; kept: freed memory is kept, for both."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Training tokens/s and peak memory of one step, ours beside transformers' eager DeepSeek-V4 with AdamW."""
    from lab_utils.bench.step import ALLOCATORS, bench_step
    from lab_utils.errors import RecipeError

    if allocator not in ALLOCATORS:
        raise RecipeError(f"--allocator {allocator}: expected one of {', '.join(ALLOCATORS)}.")
    try:
        pairs = tuple(tuple(int(n) for n in shape.split("x")) for shape in shapes.split(","))
        assert all(len(pair) == 2 for pair in pairs)
    except (ValueError, AssertionError):
        raise RecipeError(f"--shapes {shapes}: expected ROWSxTOKENS pairs, as in 8x256,1x2048.") from None
    rows = bench_step(
        preset,
        pairs,
        limit_gib=limit_gib,
        threads=threads,
        device=device,
        dtype=dtype,
        peer=peer,
        rounds=rounds,
        allocator=allocator,
        on_row=lambda row: say(f"measured {row['B']}x{row['T']}"),
    )

    def cell(value: float | None, form: str) -> str:
        return "out of memory" if value is None and peer else "" if value is None else format(value, form)

    columns = [
        "rows × T",
        "ours tok/s",
        "peer tok/s",
        "ratio",
        "ours MiB",
        "peer MiB",
        "ours % peak",
        "peer % peak",
    ]
    drawn = [
        (
            f"{row['B']}×{row['T']}",
            cell(row["ours_tokens_per_s"], ",.0f"),
            cell(row["peer_tokens_per_s"], ",.0f"),
            f"{row['ratio']:.1f}×" if row["ratio"] else "",
            cell(row["ours_peak_mib"], ",.0f"),
            cell(row["peer_peak_mib"], ",.0f"),
            f"{100 * row['fraction_of_peak']:.1f}" if row["fraction_of_peak"] else "",
            f"{100 * row['peer_fraction_of_peak']:.1f}" if row["peer_fraction_of_peak"] else "",
        )
        for row in rows
    ]
    title = (
        f"One training step, {preset}, {dtype} on {device}; peak {rows[0]['peak_flops'] / 1e9:,.0f} GFLOP/s"
    )
    emit(rows, as_json, lambda: table(title, columns, drawn, right=columns[1:]))


@app.command()
def generate(
    source: str = typer.Option("base:tiny", help="The model."),
    batches: str = typer.Option("1,8,32", help="Prompts answered together, separated by commas."),
    lengths: str = typer.Option(
        "64+64,512+128", help="Tokens of a prompt + of its answer, separated by commas."
    ),
    rounds: int = typer.Option(3, min=1, help="How often both are measured in turn."),
    threads: int = typer.Option(None, min=1, help="CPU threads; absent: torch's choice."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    dtype: str = typer.Option("float32", help="float32 or bfloat16."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Tokens generated a second, with our key-value cache beside transformers' generate."""
    from lab_utils.bench.generate import bench_generate
    from lab_utils.errors import RecipeError

    try:
        sizes = tuple(int(batch) for batch in batches.split(","))
    except ValueError:
        raise RecipeError(f"--batches {batches}: expected numbers, as in 1,8,32.") from None
    try:
        pairs = tuple(
            (int(prompt), int(new)) for prompt, new in (pair.split("+") for pair in lengths.split(","))
        )
    except ValueError:
        raise RecipeError(
            f"--lengths {lengths}: expected PROMPT+ANSWER in tokens, as in 64+64,512+128."
        ) from None
    found = bench_generate(
        source,
        sizes,
        pairs,
        rounds=rounds,
        threads=threads,
        device=device,
        dtype=dtype,
        on_row=lambda row: say(f"measured {row['lengths']}, batch {row['batch']}"),
    )
    columns = ["prompt + answer", "batch", "ours tok/s", "peer tok/s", "ratio", "same answers %"]
    drawn = [
        (
            row["lengths"],
            str(row["batch"]),
            f"{row['ours_tokens_per_s']:,.0f}",
            f"{row['peer_tokens_per_s']:,.0f}",
            f"{row['ratio']:.1f}×",
            f"{100 * row['same_tokens']:.0f}",
        )
        for row in found
    ]
    title = f"Greedy decoding, {source}, {dtype} on {device}"
    emit(found, as_json, lambda: table(title, columns, drawn, right=columns))


@app.command()
def layout(
    nproc: int = typer.Option(4, min=1, help="Ranks."),
    layouts: str = typer.Option("", help="Names as dp4_ep2_pp2 or dp4_ep2_pp2_v2; absent: all."),
    source: str = typer.Option("preset:tiny", help="The model."),
    optimizer: str = typer.Option("adamw", help="adamw or muon."),
    dtype: str = typer.Option("float32", help="float32 or bfloat16."),
    rows: int = typer.Option(16, min=1, help="Rows of a global batch."),
    row_tokens: int = typer.Option(256, min=16, help="Tokens of a row."),
    steps: int = typer.Option(5, min=1, help="Timed steps."),
    accelerator: str = typer.Option("auto", help="auto, cpu, cuda or npu."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Tokens/s, bytes sent per rank and step, and peak memory of each layout of so many ranks."""
    from lab_utils.bench.layouts import bench_layout

    found = bench_layout(
        nproc,
        layouts=[name for name in layouts.split(",") if name],
        source=source,
        optimizer=optimizer,
        dtype=dtype,
        rows=rows,
        row_tokens=row_tokens,
        steps=steps,
        accelerator=accelerator,
        on_row=lambda row: say(f"measured {row['layout']}"),
    )
    columns = ["layout", "tokens/s", "sent a rank and step, MiB", "peak of a rank, MiB"]
    drawn = [
        (
            row["layout"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['bytes_sent_per_rank'] / 2**20:,.1f}",
            f"{row['peak_mib']:,.0f}",
        )
        for row in found
    ]
    title = (
        f"Layouts of {nproc} ranks: {source}, {optimizer}, {dtype}, {rows} rows of {row_tokens} tokens a step"
    )
    emit(found, as_json, lambda: table(title, columns, drawn, right=columns[1:]))


@app.command()
def plan(
    nproc: int = typer.Option(2, min=2, help="Ranks, of one core each."),
    steps: int = typer.Option(5, min=1, help="Timed steps of a run."),
    path: Path = typer.Option(None, "--write", help="Write figures and runs to this YAML file."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """The planner's time and memory beside runs on this machine's cores, which is measured first; half an hour."""
    from lab_utils.bench.plan import bench_plan, write

    found = bench_plan(nproc, steps, lambda run: say(f"measured {run['source']}, {run['layout']}"))
    if path is not None:
        write(found, path)
    quantities = {"seconds": "s a step", "tensors_mib": "tensors, MiB", "peak_mib": "process, MiB"}
    columns = ["model", "rows × tokens", "layout", *quantities.values()]
    drawn = [
        (
            run["source"].removeprefix("preset:"),
            f"{run['rows']} × {run['row_tokens']:,}",
            run["layout"],
            *(
                f"{run[key]:,.1f}, predicted {run['predicted'][key]:,.1f} ({run['predicted'][key] / run[key] - 1:+.0%})"
                for key in quantities
            ),
        )
        for run in found["runs"]
    ]
    emit(found, as_json, lambda: table(found["machine"], columns, drawn, right=columns[3:]))


@app.command()
def quality(
    recipe: str = typer.Argument("sft_tiny", help="The recipe whose data and token budget both use."),
    run: str = typer.Option(
        None, "--run", help="An existing run of it for our side; absent: it is run first."
    ),
    limit: int = typer.Option(None, "--limit", min=1, help="At most this many questions."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Exact match after the same base, data and tokens: our engine beside a plain transformers Trainer loop."""
    from lab_utils.bench.quality import bench_quality

    result = bench_quality(recipe, run=run, limit=limit)
    rows = [
        (side, f"{100 * r['exact_match']:.1f}", f"{r['tokens']:,}", f"{r['seconds']:.0f}")
        for side, r in result.items()
    ]
    columns = ["trained by", "exact match %", "tokens", "seconds"]
    emit(result, as_json, lambda: table(f"Quality after {recipe}", columns, rows, right=columns[1:]))


@app.command()
def live(
    minutes: float = typer.Option(10.0, min=0.1, help="How long the view is watched."),
    nodes: int = typer.Option(128, min=1, help="Nodes of the run that is played."),
    chips: int = typer.Option(16, min=1, help="Chips of a node."),
    steps: int = typer.Option(10_000, min=1, help="Steps that are logged before the view is opened."),
    step_seconds: float = typer.Option(3.0, min=0.1, help="Seconds between steps."),
    chip_seconds: float = typer.Option(2.0, min=0.1, help="Seconds between samples of a node."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """What a live view of a large run costs its kernel; the run is a stand-in, played at the real rate."""
    from lab_utils.bench.live import bench_live

    found = bench_live(
        minutes,
        nodes=nodes,
        chips=chips,
        steps=steps,
        step_seconds=step_seconds,
        chip_seconds=chip_seconds,
        say=say,
    )
    update, memory = found["update_ms"], found["rss_mib"]
    rows = [
        ("kernel's processor", f"{found['cpu_percent']:.1f} % of a core"),
        (
            "its memory",
            f"{memory[0]:.0f} → {memory[1]:.0f} MiB, {found['growth_mib_a_minute']:+.2f} MiB a minute",
        ),
        (
            "an update",
            f"{update['mean']:.0f} ms, 99 % within {update['p99']:.0f}, longest {update['longest']:.0f}",
        ),
        ("longest update's processor time", f"{update['longest_of_processor']:.0f} ms"),
        ("updates", f"{found['updates']:,}"),
        ("sent to the browser", f"{found['kib_a_s']:.1f} KiB/s in {found['messages_a_s']:.1f} messages/s"),
        (
            "first look",
            f"caught up after {found['caught_up_s']:.1f} s, {found['open_s']:.1f} of them to open",
        ),
        ("longest update until then", f"{found['longest_while_catching_up_ms']:.0f} ms"),
    ]
    title = (
        f"A live view of {nodes * chips:,} chips (stand-in data), {minutes:g} minutes, {steps:,} steps before"
    )
    emit(found, as_json, lambda: table(title, ["", ""], rows))
