"""A live view that stands still: the same numbers as HTML for a saved notebook, no script."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from lab_utils.runs._chip_feed import ChipFeed, Node
from lab_utils.runs.api import Run
from lab_utils.runs.follow import Follower
from lab_utils.runs.series import STEP, Buckets
from lab_utils.telemetry.chips import aggregate, unhealthy
from lab_utils.widgets._chart import panel_spec, panels_of
from lab_utils.widgets._standing import SOFT, Asker, ask_launcher, error_rows, errors_html, head, standing
from lab_utils.widgets._strip import sample_rows
from lab_utils.widgets._words import number, text

_CELL = "text-align:left;padding:2px 14px 2px 0;border-bottom:1px solid var(--jp-border-color2,#e4e7eb)"
_PRE = (
    "font-size:11px;line-height:1.45;padding:6px 9px;white-space:pre-wrap;overflow-wrap:anywhere;"
    "background:var(--jp-layout-color2,#f3f5f7)"
)
WORST = 5  # nodes that are listed
TAIL, ANSWERS = 12, 3
WIDE, HIGH = 180, 26


def still(run: Run) -> str:
    """The run as it is now."""
    follower = Follower(run.path)
    follower.catch_up()
    at = standing(follower, Asker(lambda: ask_launcher(run)).wait())
    try:
        objective = run.recipe.objective.kind
    except Exception:  # of another version: its curves are what they are
        objective = ""
    parts = [
        head(run.name, at, follower.series.latest()),
        _metrics(follower.series.buckets, objective),
        _chips(follower.chips),
        errors_html(error_rows(follower)),
        _log(follower.logs.shown, follower.logs.lines[-TAIL:]),
        _samples(sample_rows(follower)[:ANSWERS]),
    ]
    font = "font-family:var(--jp-ui-font-family,system-ui,sans-serif);font-size:12px"
    return f'<div style="{font}">{"".join(parts)}</div>'


def _table(columns: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML."""
    head_ = "".join(f'<th style="{_CELL};{SOFT}">{text(column)}</th>' for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td style={chr(34)}{_CELL}{chr(34)}>{cell}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return (
        '<table style="border-collapse:collapse;margin:8px 0;font-size:12px;font-variant-numeric:tabular-nums">'
        f"<tr>{head_}</tr>{body}</table>"
    )


def _metrics(buckets: Buckets, objective: str) -> str:
    rows = []
    for panel in panels_of(objective):
        keys = [key for key in panel.keys if buckets.has(key)]
        for line in panel_spec(panel, keys)["lines"]:
            points = buckets.table(0, buckets.size, [STEP, line["key"]])
            points = points[np.isfinite(points[:, 1, 0])]
            mean, low, high = (points[:, 1, i] * panel.scale for i in range(3))
            if panel.kind == "area" and not mean.any():
                continue  # a part that never took any time is no part
            name = panel.title if len(keys) == 1 else f"{panel.title}: {line['label']}"
            values = [number(float(v)) for v in (mean[0], mean[-1], low.min(), high.max())]
            rows.append([text(name), *values, text(panel.unit), _spark(points[:, 0, 0], mean)])
    if not rows:
        return f'<div style="{SOFT}">No step has been logged yet.</div>'
    return _table(["", "first", "last", "lowest", "highest", "unit", "by step"], rows)


def _spark(x: np.ndarray, y: np.ndarray) -> str:
    """A curve without axes."""
    wide, high = float(np.ptp(x)) or 1.0, float(np.ptp(y)) or 1.0
    at = zip((WIDE - 2) * (x - x.min()) / wide + 1, (HIGH - 4) * (1 - (y - y.min()) / high) + 2)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
    return (
        f'<svg width="{WIDE}" height="{HIGH}" style="display:block"><polyline points="{line}" fill="none" '
        'stroke="#2f6fde" stroke-width="1.3"/></svg>'
    )


def _chips(feed: ChipFeed) -> str:
    now = time.time()
    nodes = feed.worst_first(max((node.time for node in feed.nodes.values()), default=now))
    if not nodes:
        return ""
    shown, rest = nodes[:WORST], nodes[WORST:]
    rows = [[f"node {node.number}", str(len(node.chips)), *_aggregate([node])] for node in shown]
    if rest:
        rows.append(
            [f"{len(rest)} other nodes", str(sum(len(node.chips) for node in rest)), *_aggregate(rest)]
        )
    return _table(
        ["last sample", "chips", "mean use, %", "idlest, %", "fullest, %", "hottest, °C", "health"], rows
    )


def _aggregate(nodes: list[Node]) -> list[str]:
    chips = [chip for node in nodes for chip in node.chips]
    found = aggregate(chips)
    sick = sum(map(unhealthy, chips))
    told: list[Any] = [
        found.get("chip/util_mean"),
        found.get("chip/util_min"),
        100 * found["chip/hbm_frac"] if "chip/hbm_frac" in found else None,
        found.get("chip/temp_max"),
    ]
    health = f"{sick} not well" if sick else "well" if "chip/unhealthy" in found else "not said"
    return [*map(number, told), health]


def _log(name: str, lines: list[str]) -> str:
    if not lines:
        return ""
    listed = text("\n".join(lines))
    return f'<div style="{SOFT};margin-top:6px">End of {text(name)}</div><pre style="{_PRE}">{listed}</pre>'


def _samples(rows: list[dict[str, str]]) -> str:
    return "".join(
        f'<div style="margin:4px 0"><span style="{SOFT}">{text(row["head"])}</span><div style="{SOFT}">'
        f'{text(row["prompt"])}</div><div style="border-left:3px solid #2f6fde;padding-left:8px;white-space:pre-wrap">'
        f"{text(row['completion'])}</div></div>"
        for row in rows
    )
