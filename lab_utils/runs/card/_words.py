"""Numbers as a reader of a run card sees them; ``None`` is "not recorded" everywhere, and never 0."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

NOT_RECORDED = "not recorded"
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def known(show: Callable[[Any], str]) -> Callable[[Any], str]:
    """``show`` for what is known; the words above for what isn't, or is no number where one is needed."""

    def shown(value: Any) -> str:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return NOT_RECORDED
        return show(value)

    return shown


@known
def text(value: Any) -> str:
    """Anything in words: yes and no, lists with commas, mappings as ``key value``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(text(inner) for inner in value) or "none"
    return str(value)


@known
def whole(value: float) -> str:
    return f"{value:,.0f}"


@known
def short(value: float) -> str:
    """Three figures and a letter: 2.03 M."""
    for size, letter in _STEPS:
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


@known
def figures(value: float) -> str:
    """Four figures."""
    return f"{value:,.4g}"


@known
def share(value: float) -> str:
    return f"{100 * value:.1f} %"


@known
def duration(seconds: float) -> str:
    """The two largest of days, hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    parts, left = [], round(seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


@known
def moment(seconds: float) -> str:
    """A time of day in UTC: cards of one run read the same everywhere."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


@known
def energy(kwh: float) -> str:
    return f"{kwh:,.3g} kWh" if kwh < 1000 else f"{kwh / 1000:,.3g} MWh"


@known
def size(count: float) -> str:
    """Bytes."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def unit(value: Any, word: str, show: Callable[[Any], str] = whole) -> str:
    """A value with its unit, which what isn't recorded has not."""
    shown = show(value)
    return shown if shown == NOT_RECORDED else f"{shown} {word}"
