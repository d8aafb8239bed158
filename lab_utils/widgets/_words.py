"""Numbers, spans of time and states as a person reads them, and text as HTML."""

from __future__ import annotations

import html
import math
from typing import Any

# What colours a state: variables of JupyterLab, with colours for a page without it.
COLORS = {
    "running": "var(--jp-success-color1, #2e7d32)",
    "succeeded": "var(--jp-brand-color1, #1976d2)",
    "stopping": "var(--jp-warn-color1, #b26a00)",
    "stopped": "var(--jp-warn-color1, #b26a00)",
    "queued": "var(--jp-info-color1, #0277bd)",
    "failed": "var(--jp-error-color1, #c62828)",
    "lost": "var(--jp-error-color1, #c62828)",
    "damaged": "var(--jp-error-color1, #c62828)",
}


def text(value: Any) -> str:
    """A value as HTML text."""
    return html.escape(str(value))


def badge(state: str) -> str:
    """A state as a coloured word."""
    color = COLORS.get(state, "var(--jp-ui-font-color2, #616e7c)")
    style = f"background:{color};color:#fff;border-radius:3px;padding:1px 7px;font-weight:600"
    return f'<span style="{style}">{text(state)}</span>'


def span(seconds: float | None) -> str:
    """Seconds in the one or two units that matter."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    seconds = max(seconds, 0.0)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min" if hours < 10 else f"{seconds / 3600:.0f} h"
    return f"{seconds / 86_400:.1f} days"


def number(value: float | None) -> str:
    """Four digits, thousands shortened."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not finite"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.4g}"
