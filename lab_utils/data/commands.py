"""``lab data list | verify | preview | stats | add | pin | croissant``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from lab_utils.console import emit, say, table
from lab_utils.errors import DataError

if TYPE_CHECKING:
    from lab_utils.data.documents import Encoding
    from lab_utils.data.manifest import Manifest

app = typer.Typer(help="Data sets: their manifests, their content, their checks.", no_args_is_help=True)

Name = typer.Argument(help="A manifest's name, or a .yaml file.")
Json = typer.Option(False, "--json", help="Print JSON.")
Mode = typer.Option("chat", "--mode", help="Reasoning mode of the encoding: chat or thinking.")
KeepThinking = typer.Option(False, "--keep-thinking", help="Keep the reasoning of earlier turns.")
Tokenizer = typer.Option(None, "--tokenizer", help="Folder or tokenizer.json; default: the shipped one.")
Texts = typer.Option(
    None, "--encoding", help="A checkpoint's encoding/ folder; default: the shipped wording."
)


@app.command("list")
def list_sets(as_json: bool = Json) -> None:
    """Every set, with its splits and whether it can be used as it is."""
    from lab_utils.data.manifest import list_manifests

    rows = [
        {
            "name": m.name,
            "version": m.version,
            "format": m.format,
            "licence": m.licence,
            "splits": {split: m.row_count(split) for split in m.splits},
            "source": next(iter(m.splits.values())).kind,
            "ready": not m.unpinned(),
            "path": str(m.path),
        }
        for m in list_manifests()
    ]

    def render() -> None:
        cells = [
            (
                r["name"],
                r["format"],
                ", ".join(s if n is None else f"{s} {n:,}" for s, n in r["splits"].items()),
                r["licence"],
                r["source"] if r["ready"] else f"{r['source']}: run lab data pin",
            )
            for r in rows
        ]
        table("Data sets", ["name", "format", "splits and rows", "licence", "source"], cells)

    emit(rows, as_json, render)


@app.command()
def verify(
    names: list[str] = typer.Argument(None, help="Manifests; none: all but hub sets that aren't pinned."),
    as_json: bool = Json,
) -> None:
    """Check files, checksums, sizes, row counts and every row; exit code 3 if anything is wrong."""
    from lab_utils.data.manifest import list_manifests, load_manifest

    chosen = [load_manifest(name) for name in names] if names else list_manifests()
    skipped = [] if names else [m.name for m in chosen if m.unpinned()]
    chosen = [m for m in chosen if m.name not in skipped]
    problems = [problem for manifest in chosen for problem in manifest.verify()]
    result = {
        "ok": not problems,
        "problems": [{"manifest": p.manifest, "split": p.split, "message": p.message} for p in problems],
        "verified": [m.name for m in chosen],
        "not_pinned": skipped,
    }

    def render() -> None:
        bad = {p.manifest for p in problems}
        for manifest in chosen:
            print(f"{'BAD' if manifest.name in bad else 'ok '}  {manifest.name}")
        for name in skipped:
            print(f"-    {name} (not pinned: run lab data pin {name} on a connected machine)")

    emit(result, as_json, render)
    if problems:
        first, *others = dict.fromkeys(
            problem.message for problem in problems
        )  # one may stand for several splits
        for message in others:
            say(f"error: {message}")
        raise DataError(first)


@app.command()
def preview(
    name: str = Name,
    split: str = typer.Option("train", "--split", help="Split."),
    rows: int = typer.Option(3, "--rows", "-n", min=1, help="How many rows."),
    start: int = typer.Option(1, "--from", min=1, help="First row, counted from 1."),
    mode: str = Mode,
    keep_thinking: bool = KeepThinking,
    tokenizer: str = Tokenizer,
    encoding: str = Texts,
    as_json: bool = Json,
) -> None:
    """Rows as the model sees them; what bears loss is green, special tokens are magenta."""
    from lab_utils.data.manifest import load_manifest
    from lab_utils.data.preview import rows_as_seen

    manifest = load_manifest(name)
    how = _encoding(tokenizer, mode, keep_thinking, encoding)
    shown = []
    for row in rows_as_seen(manifest, split, how, start=start, rows=rows):
        parts = {side: [vars(s) for s in segments] for side, segments in row.parts.items()}
        shown.append({"place": row.place, "tokens": row.tokens, **parts})
    if not shown:
        raise DataError(f"{name}: split {split} has no row {start}.")
    emit(shown, as_json, lambda: _print_rows(shown))


def _print_rows(shown: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for row in shown:
        console.rule(f"{row['place']} · {row['tokens']} tokens", align="left")
        for side in ("text", "messages", "chosen", "rejected"):
            if side not in row:
                continue
            if side in ("chosen", "rejected"):
                console.print(f"[bold]{side}[/bold]")
            text = Text()
            for segment in row[side]:
                colour = "green" if segment["supervised"] else "magenta" if segment["markup"] else ""
                text.append(
                    segment["text"], style=f"{colour} {'bold' if segment['supervised'] else ''}".strip()
                )
            console.print(text)
    console.print("\n[bold green]bears loss[/bold green] · [magenta]special tokens and fixed texts[/magenta]")


@app.command()
def stats(
    name: str = Name,
    split: str = typer.Option(None, "--split", help="One split; default: all."),
    row_tokens: int = typer.Option(1024, "--row-tokens", min=16, help="Row length to pack for."),
    mode: str = Mode,
    keep_thinking: bool = KeepThinking,
    tokenizer: str = Tokenizer,
    encoding: str = Texts,
    kto: bool = typer.Option(
        False, "--kto", help="Pairs as objective.loss=kto takes them: three documents each."
    ),
    as_json: bool = Json,
) -> None:
    """Documents, tokens, tokens that bear loss, lengths, and padding at a row length; of preferences, by pairs."""
    from lab_utils.data.manifest import load_manifest
    from lab_utils.data.statistics import split_statistics

    manifest = load_manifest(name)
    how = _encoding(tokenizer, mode, keep_thinking, encoding)
    splits = [split] if split else list(manifest.splits)
    found = {s: split_statistics(manifest, s, how, row_tokens, mismatched=kto) for s in splits}
    emit({"manifest": manifest.name, "splits": found}, as_json, lambda: _print_stats(manifest.name, found))


def _print_stats(name: str, found: dict[str, dict[str, Any]]) -> None:
    """A line a split; what is packed, and so what has lengths, is a pair where there are pairs, else a document."""
    first = next(iter(found.values()))
    paired = "pairs" in first
    whole = (
        {"pairs": lambda v: f"{v['pairs']:,}"} if paired else {"documents": lambda v: f"{v['documents']:,}"}
    )
    parts = {part: lambda v, part=part: f"{v['tokens_of'][part]:,}" for part in first.get("tokens_of", ())}
    columns = {
        **whole,
        "tokens": lambda v: f"{v['tokens']:,}",
        **parts,
        "bear loss": lambda v: f"{v['supervised_tokens'] / max(1, v['tokens']):.1%}",
        "p50": lambda v: v["length"].get("p50", "-"),
        "p99": lambda v: v["length"].get("p99", "-"),
        "longest": lambda v: v["length"].get("max", "-"),
        "rows": lambda v: f"{v['rows']:,}",
        "padding": lambda v: f"{v['padding_fraction']:.2%}",
        "too long": lambda v: v["longer_than_row"],
    }
    cells = [(split, *(of(v) for of in columns.values())) for split, v in found.items()]
    table(f"{name} in rows of {first['row_tokens']} tokens", ["split", *columns], cells, right=list(columns))
    if paired:
        longest = max(v["length"].get("max", 0) for v in found.values())
        print(f"A pair shares a row: data.row_tokens of {longest} or more takes every one.")


@app.command()
def add(
    file: str = typer.Argument(help="Your data: .jsonl, .jsonl.gz or .parquet. It is not changed."),
    format: str = typer.Option("auto", "--format", help="auto, messages, preference, prompt or text."),
    name: str = typer.Option(None, "--name", help="Name of the manifest; default: the file's."),
    licence: str = typer.Option("not stated", "--licence", help="Licence of the data, for the record."),
    provenance: str = typer.Option(None, "--provenance", help="Where the data is from, for the record."),
    validation: float = typer.Option(0.0, "--validation", help="Share of the rows to hold out, as 0.05."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the held-out share."),
    into: str = typer.Option(None, "--into", help="Folder of the manifest; default: data_manifests."),
    replace: bool = typer.Option(False, "--replace", help="Write over a manifest of that name."),
    as_json: bool = Json,
) -> None:
    """Make a manifest for your own file: every row is checked; if any is bad, they are listed by line."""
    from lab_utils.data.add import add as add_file

    manifest = add_file(
        file,
        format=format,
        name=name,
        licence=licence,
        provenance=provenance,
        validation=validation,
        seed=seed,
        folder=into,
        replace=replace,
    )
    result = {
        "name": manifest.name,
        "path": str(manifest.path),
        "format": manifest.format,
        "columns": manifest.columns,
        "splits": {s: manifest.row_count(s) for s in manifest.splits},
    }

    def render() -> None:
        counts = ", ".join(f"{s} {n:,}" for s, n in result["splits"].items())
        print(f"{manifest.name}: format {manifest.format}, rows: {counts}\nmanifest   {manifest.path}")
        print(f"look       lab data preview {manifest.name}")
        print(
            f"train      lab run sft_tiny --set data.train.0.manifest={manifest.name} --set "
            "data.validation=[]"
        )

    emit(result, as_json, render)


@app.command()
def pin(name: str = Name, as_json: bool = Json) -> None:
    """Fill in commit, files and hashes of a hub set, as they are now; needs a connection."""
    from lab_utils.data.hub import pin as pin_set
    from lab_utils.data.manifest import load_manifest

    manifest = load_manifest(name)
    pinned = pin_set(manifest)
    assert manifest.path is not None  # load_manifest always knows it
    pinned.save(manifest.path)
    result = {
        "name": pinned.name,
        "path": str(manifest.path),
        "splits": {
            s: {
                "revision": source.revision,
                "files": len(source.files),
                "bytes": sum(f.bytes for f in source.files),
            }
            for s, source in pinned.splits.items()
            if source.kind == "hub"
        },
    }

    def render() -> None:
        for split, about in result["splits"].items():
            print(f"{split}: {about['revision'][:12]}, {about['files']} files, {about['bytes']:,} bytes")
        print(f"written to {manifest.path}")

    emit(result, as_json, render)


@app.command()
def croissant(name: str = Name, as_json: bool = Json) -> None:
    """The manifest as Croissant JSON-LD, on standard output (with or without --json)."""
    from lab_utils.data.croissant import to_croissant
    from lab_utils.data.manifest import load_manifest

    manifest: Manifest = load_manifest(name)
    emit(to_croissant(manifest), True)


def _encoding(tokenizer: str | None, mode: str, keep_thinking: bool, texts: str | None) -> Encoding:
    from lab_utils.data.documents import Encoding
    from lab_utils.data.fixed_texts import FixedTexts
    from lab_utils.data.tokenizer import load_tokenizer

    return Encoding(
        load_tokenizer(tokenizer),
        mode,
        not keep_thinking,
        FixedTexts.from_encoding_folder(texts) if texts else None,
    )
