"""Lines of metrics.jsonl as a table of steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def merge_steps(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Logged lines by step; a step that comes again after a later one starts a new attempt from there."""
    table: dict[int, dict[str, Any]] = {}
    newest = -1
    for row in rows:
        if not isinstance(row.get("step"), int):
            continue
        values = dict(row)
        step = values.pop("step")
        if step < newest:
            table = {s: v for s, v in table.items() if s < step}
        newest = step
        table.setdefault(step, {}).update(values)
    return table
