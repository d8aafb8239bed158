"""How a verb prints: JSON for programs, rich tables for people, one sentence for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def emit(result: Any, as_json: bool, render: Callable[[], None] | None = None) -> None:
    """Print ``result``: as JSON on standard output, or through ``render`` for a person."""
    if as_json or render is None:
        json.dump(result, sys.stdout, indent=2, ensure_ascii=False, default=str)
        sys.stdout.write("\n")
    else:
        render()


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()
) -> None:
    """A table on standard output; columns named in ``right`` are aligned to the right, as numbers are."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(drawn)


def say(text: str) -> None:
    """A line for a person, on standard error, so that standard output stays parseable."""
    print(text, file=sys.stderr, flush=True)
