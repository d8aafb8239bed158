"""``lab eval TARGET --on MANIFEST,…``."""

from __future__ import annotations

import typer

from lab_utils.console import emit, say


def evaluate(
    target: str = typer.Argument(
        "last",
        help="A run's name, unique prefix, path, or last; a checkpoint folder of a run; a model folder or base:NAME.",
    ),
    on: str = typer.Option(
        "ascent-tasks-prompts",
        "--on",
        help="Manifests with commas, NAME or NAME:SPLIT: prompt (questions), messages, text (perplexity), preference.",
    ),
    split: str = typer.Option(
        None, "--split", help="Split where --on names none; absent: test, else validation."
    ),
    limit: int = typer.Option(None, "--limit", min=1, help="At most this many rows of each manifest."),
    base: str = typer.Option(
        None, "--base", help="Weights to compare with; absent: those that the run started from."
    ),
    no_base: bool = typer.Option(False, "--no-base", help="Compare with nothing."),
    samples: int = typer.Option(
        4, "--samples", min=0, help="Answers drawn to a question for pass@k; 0: none."
    ),
    k: str = typer.Option(None, "--k", help="The k of pass@k with commas; absent: 1 and --samples."),
    temperature: float = typer.Option(1.0, "--temperature", help="Of the drawn answers."),
    modes: str = typer.Option(
        None, "--modes", help="Reasoning modes with commas: chat,thinking,max; absent: the run's own."
    ),
    budget: str = typer.Option(
        None, "--budget", help="Longest answer in tokens: one number, or by mode as chat=96,max=1024."
    ),
    against: str = typer.Option(None, "--against", help="Another target: which of the two answers better."),
    judge: str = typer.Option(
        "exact", "--judge", help="Of --against: exact (the verifiers), or a target that judges in words."
    ),
    reference: str = typer.Option(
        None, "--reference", help="Reference of the reward accuracy; absent: the base."
    ),
    out: str = typer.Option(None, "--out", help="Folder of report.json and samples.html; absent: the run's."),
    accelerator: str = typer.Option("auto", "--accelerator", help="auto, cpu, cuda or npu."),
    dtype: str = typer.Option("float32", "--dtype", help="float32 or bfloat16."),
    seed: int = typer.Option(0, "--seed", help="Of sampling."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Evaluate weights on held-out data, beside those before training: report.json and samples.html in the run."""
    from lab_utils.errors import RecipeError
    from lab_utils.evaluation import report

    if base and no_base:
        raise RecipeError("--base and --no-base exclude each other: give one of them.")
    found = report.evaluate(
        target,
        on=on,
        split=split,
        limit=limit,
        base=False if no_base else base,
        against=against,
        judge=judge,
        reference=reference,
        modes=modes,
        budget=budget,
        samples=samples,
        k=k,
        temperature=temperature,
        out=out,
        accelerator=accelerator,
        dtype=dtype,
        seed=seed,
    )

    def render() -> None:
        report.show(found)
        for line in dict.fromkeys(found["notes"].values()):
            say(line)
        if found["folder"]:
            print(f"report and samples  {found['folder']}")

    emit(found, as_json, render)
