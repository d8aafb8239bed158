"""``lab data add``: a manifest for a user's own file, which is checked row by row and never changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lab_utils.data import sources
from lab_utils.data.columns import COLUMNS, Row, to_ours
from lab_utils.data.manifest import FileEntry, FileSource, Manifest, Share, folders
from lab_utils.data.row_check import check_row
from lab_utils.errors import DataError
from lab_utils.registry import nearest

SHOWN = 20  # bad rows that are listed
# Question and answer under the names of well-known sets.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("problem", "solution"),
    ("query", "response"),
    ("input", "output"),
)


def detect(row: Row, format: str = "auto") -> tuple[str, dict[str, str]]:
    """Format and column mapping of a set, from one of its rows.

    Args:
        row: a row in their columns.
        format: what it has to be; ``auto`` takes the first that fits.

    Raises:
        DataError: no known layout of these columns.
    """
    for found, columns in _layouts(row):
        if format in ("auto", found):
            return found, columns
    wanted = "messages, preference, prompt or text" if format == "auto" else format
    raise DataError(
        f"columns {', '.join(sorted(row)) or '(none)'} are no known layout of {wanted}: expected messages, "
        "conversations, "
        "question + answer (prompt + completion, instruction + output), chosen + rejected, prompt, or text"
    )


def _layouts(row: Row) -> Any:
    """Every layout that the columns of a row allow, the most telling first."""
    also = {
        name: name for name in ("tools", "system") if isinstance(row.get(name), str | list) and row.get(name)
    }
    tools = {"tools": "tools"} if "tools" in row else {}
    if "chosen" in row and "rejected" in row:
        prompt = next(({"prompt": c} for c in ("prompt", "question", "instruction") if c in row), {})
        yield "preference", {**prompt, "chosen": "chosen", "rejected": "rejected", **tools}
    if isinstance(row.get("messages"), list):
        asks = (
            row["messages"]
            and isinstance(row["messages"][-1], dict)
            and row["messages"][-1].get("role") == "user"
        )
        layouts = [
            ("messages", {"messages": "messages", **tools}),
            ("prompt", {"messages": "messages", **tools}),
        ]
        yield from reversed(layouts) if asks else layouts
    if isinstance(row.get("conversations"), list):
        yield "messages", {"conversations": "conversations", **tools}
    if {"query", "tools", "answers"} <= row.keys():
        yield "messages", {"user": "query", "tools": "tools", "calls": "answers"}
    for question, answer in PAIRS:
        if isinstance(row.get(question), str) and isinstance(row.get(answer), str):
            more = {"input": "input"} if question == "instruction" and "input" in row else {}
            yield "messages", {"user": question, **more, "assistant": answer, **also}
    for question in ("prompt", "question", "instruction", "problem", "query"):
        if isinstance(row.get(question), list):
            yield "prompt", {"messages": question, **tools}
        elif isinstance(row.get(question), str):
            yield "prompt", {"user": question}
    if isinstance(row.get("text"), str):
        yield "text", {"text": "text"}


def add(
    path: str | Path,
    *,
    format: str = "auto",
    name: str | None = None,
    licence: str = "not stated",
    provenance: str | None = None,
    validation: float = 0.0,
    seed: int = 0,
    folder: str | Path | None = None,
    replace: bool = False,
) -> Manifest:
    """Check every row of a file and write a manifest for it.

    Args:
        path: .jsonl, .jsonl.gz or .parquet.
        format: ``auto``, or what it has to be.
        name: of the manifest; absent: made from the file's.
        licence: of the data, for the record.
        provenance: where it is from; absent: the path.
        validation: share of the rows held out as split ``validation``, by a hash of their content.
        seed: of that choice.
        folder: where the manifest goes; absent: the first folder that manifests are looked for in.
        replace: write over a manifest of that name.

    Raises:
        DataError: unreadable, empty, of no known layout, or with bad rows (the first 20 are listed);
            nothing is written then.
    """
    file = Path(path).resolve()
    if format != "auto" and format not in COLUMNS:
        raise DataError(f"--format {format}: {nearest(format, ['auto', *COLUMNS])}.")
    if not 0 <= validation < 1:
        raise DataError(f"--validation {validation}: expected a share from 0 to below 1.")
    name = name or re.sub(r"[^a-z0-9._-]+", "-", file.name.lower().split(".")[0]).strip("-._") or "data"
    target = Path(folder or folders()[0]).resolve() / f"{name}.yaml"
    if target.exists() and not replace:
        raise DataError(f"{target}: there is a manifest '{name}' already; give another --name, or --replace.")
    before = file.stat() if file.exists() else None
    format, columns, total, held_out = _checked(file, format, validation, seed)
    entry = FileEntry(
        path=file.relative_to(target.parent).as_posix() if file.is_relative_to(target.parent) else str(file),
        sha256=sources.sha256_of(file),
        bytes=file.stat().st_size,
        rows=total,
    )
    after = file.stat()
    if before is None or (after.st_mtime_ns, after.st_size) != (before.st_mtime_ns, before.st_size):
        raise DataError(f"{file}: the file changed while it was read; add it again when it is complete.")

    def split(start: float, stop: float, rows: int) -> FileSource:
        share = Share(seed=seed, start=start, stop=stop, rows=rows) if validation else None
        return FileSource(files=(entry,), share=share)

    splits: dict[str, Any] = {"train": split(validation, 1.0, total - held_out)}
    if validation:
        splits["validation"] = split(0.0, validation, held_out)
    manifest = Manifest(
        name=name,
        version="1",
        licence=licence,
        provenance=provenance or f"Added from {file}.",
        format=format,
        columns={} if all(ours == theirs for ours, theirs in columns.items()) else columns,
        splits=splits,
        path=target,
    )
    manifest.save(target)
    return manifest


def _checked(file: Path, format: str, validation: float, seed: int) -> tuple[str, dict[str, str], int, int]:
    """Format, columns, number of rows and how many of them are held out.

    Raises:
        DataError: as for ``add``.
    """
    layout: tuple[str, dict[str, str]] | None = None
    bad: list[str] = []
    total = bad_rows = held_out = 0
    for place, row in sources.read_lines(file):
        total += 1
        problem: str | None = row if isinstance(row, str) else None
        if isinstance(row, dict):
            try:
                layout = layout or detect(row, format)
                problem = check_row(to_ours(row, *layout), layout[0])
            except DataError as error:
                problem = str(error)
            held_out += sources.uniform(row, seed) < validation
        if problem:
            bad_rows += 1
            if len(bad) < SHOWN:
                bad.append(f"{place.rpartition(file.name + ' ')[2]}: {problem}")
    if bad_rows:
        more = f"\n  … and {bad_rows - SHOWN} more" if bad_rows > SHOWN else ""
        raise DataError(
            f"{file}: {bad_rows} of {total} rows are bad, so nothing was written; correct or remove them:\n  "
            + "\n  ".join(bad)
            + more
        )
    if layout is None:
        raise DataError(f"{file}: the file has no rows; expected at least one.")
    return *layout, total, held_out
