"""Curves as SVG inside a page: no library, no script, sharp in print. Which ones is ``panels/layout.py``'s business."""

from __future__ import annotations

import html
import math
from typing import Any

from lab_utils.panels.layout import ALIGNMENT, OVERVIEW, PANELS, Panel

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30  # margins of the plotted area
SERIES = ("#2f6fde", "#e4572e", "#3aa17e", "#8d6cab", "#c9a227", "#5c6b7a")
MOST = 9
Curves = dict[str, list[list[float]]]


def charts(curves: Curves, objective: str | None) -> list[tuple[str, str, str]]:
    """Title, unit and SVG of the panels that this kind of run is judged by, as far as it logged them."""
    by_title = {panel.title: panel for panel in PANELS}
    wanted = dict.fromkeys((*ALIGNMENT.get(objective or "", ()), *OVERVIEW))
    found = []
    for panel in (by_title[title] for title in wanted if title in by_title):
        drawn = {key: curves[key] for key in panel.keys if len(curves.get(key, ())) > 1}
        if drawn and panel.kind != "area" and len(found) < MOST:
            found.append((panel.title, panel.unit, _svg(panel, drawn)))
    return found


def _svg(panel: Panel, curves: Curves) -> str:
    scaled = {key: [(x, y * panel.scale) for x, y in points] for key, points in curves.items()}
    values = [y for points in scaled.values() for _, y in points]
    steps = [x for points in scaled.values() for x, _ in points]
    log = panel.kind == "log" and min(values) > 0 and max(values) > 2 * min(values)
    rows = _log_ticks(min(values), max(values)) if log else _ticks(min(values), max(values))
    low, high = min(rows[0], *values), max(rows[-1], *values)
    columns = [t for t in _ticks(min(steps), max(steps), 4) if min(steps) <= t <= max(steps)]

    def x_of(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - min(steps)) / ((max(steps) - min(steps)) or 1)

    def y_of(value: float) -> float:
        if log:
            part = math.log(value / low) / math.log(high / low)
        else:
            part = (value - low) / ((high - low) or 1)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - part)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(panel.title)}">']
    for tick in rows:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_label(tick)}</text>'
        )
    for tick in columns:
        x = x_of(tick)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{_label(tick)}</text>'
        )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    names = _names(list(scaled))
    for index, points in enumerate(scaled.values()):
        line = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        few = len(points) <= 30  # evaluations: each of them counts
        dots = (
            "".join(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2"/>' for x, y in points)
            if few
            else ""
        )
        parts.append(
            f'<g class="curve" style="--c:{SERIES[index % len(SERIES)]}"><polyline points="{line}"/>{dots}</g>'
        )
        if len(scaled) > 1:
            at = LEFT + sum(14 + 6.2 * len(name) for name in names[:index])
            parts.append(
                f'<circle cx="{at + 3}" cy="{HEIGHT - 7}" r="3" fill="{SERIES[index % len(SERIES)]}"/>'
            )
            parts.append(
                f'<text class="tick" x="{at + 9}" y="{HEIGHT - 3}">{html.escape(names[index])}</text>'
            )
    return "".join(parts) + "</svg>"


def _names(keys: list[str]) -> list[str]:
    heads = [key.partition("/")[0] for key in keys]
    if len(set(heads)) == len(keys):
        return heads
    return [key.rpartition("/")[2].replace("_", " ") for key in keys]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose the range."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= rough)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(i * size, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each power of ten inside the range; fewer where it is wide."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors: tuple[float, ...] = (1, 2, 5) if len(powers) <= 3 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in found if low <= tick <= high]
    if len(inside) >= 2:
        return inside
    return [low, high]


def _label(tick: Any) -> str:
    if tick == 0:
        return "0"
    size = abs(tick)
    if size >= 1e9 or size < 1e-3:
        return f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if size >= 1e6:
        return f"{tick / 1e6:g}M"
    if size >= 1e4:
        return f"{tick / 1e3:g}k"
    return f"{tick:.4g}"
