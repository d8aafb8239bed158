"""A row of data as a person reads it: rendered chat with the loss-bearing text marked, as HTML for a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

_BOX = (
    "font-family:ui-monospace,monospace;font-size:12.5px;line-height:1.65;white-space:pre-wrap;"
    "border:1px solid #e4e7eb;border-radius:6px;padding:10px 12px;margin:6px 0;color:#1f2933;background:#fff"
)
_LOSS = "background:#d6ecdf;border-bottom:2px solid #3a9e6f"
_MARKUP = "color:#8d6cab"


def chat_html(segments: Iterable[Any], title: str = "") -> Any:
    """Segments of the chat encoding as one HTML box.

    Args:
        segments: objects with ``text``, ``supervised`` (bears loss) and ``markup`` (special tokens).
        title: a line above the box.
    """
    from IPython.display import HTML

    parts = []
    for segment in segments:
        style = ";".join(
            s for s in (_LOSS if segment.supervised else "", _MARKUP if segment.markup else "") if s
        )
        text = html.escape(segment.text)
        parts.append(f'<span style="{style}">{text}</span>' if style else text)
    key = (
        f'<div style="font-size:12px;color:#7b8794;margin-top:4px">{html.escape(title)} '
        f'<span style="{_LOSS};color:#1f2933;padding:0 4px">bears loss</span> '
        f'<span style="{_MARKUP};padding:0 4px">special token</span></div>'
    )
    return HTML(f'{key}<div style="{_BOX}">{"".join(parts)}</div>')
