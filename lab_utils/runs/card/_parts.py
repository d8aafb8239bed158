"""What a card is drawn from: sections of lines and tables, which Markdown and HTML both show, in one order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of cells; the columns whose index is in ``right`` hold numbers. A ``folded`` one is opened by a reader."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right: tuple[int, ...] = ()
    folded: str = ""


@dataclass(frozen=True)
class Part:
    """A section: lines of label and value, then tables, then lines to type, then a text as it is."""

    title: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    source: str = ""


@dataclass(frozen=True)
class Sheet:
    title: str
    lead: str
    headline: list[tuple[str, str]]
    parts: list[Part]


def columns_of(table: Table) -> Sequence[tuple[str, bool]]:
    """Titles, each with whether its cells are numbers."""
    return [(title, index in table.right) for index, title in enumerate(table.columns)]


def known(part: Any) -> dict[str, Any]:
    """A part of the card's JSON, {} where it isn't recorded."""
    return part if isinstance(part, dict) else {}


def reason(card: dict[str, Any], key: str) -> str:
    """Why a figure is missing, in brackets."""
    found = card["not_recorded"].get(key)
    return f" ({found})" if found else ""
