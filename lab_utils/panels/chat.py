"""A row of data as a person reads it: rendered chat with the loss-bearing text marked, as HTML for a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

# JupyterLab's own colours where there are any: readable under its light and dark themes, and in a saved page.
_TEXT = "color:var(--jp-ui-font-color1,#1f2933)"
_BOX = (
    "font-family:var(--jp-code-font-family,ui-monospace,monospace);font-size:12.5px;line-height:1.65;"
    "white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--jp-border-color2,#e4e7eb);border-radius:4px;"
    f"padding:6px 10px;margin:4px 0;background:var(--jp-layout-color1,#fff);{_TEXT}"
)
_LOSS = "background:rgba(58,158,111,.22);border-bottom:2px solid #3a9e6f"
_MARKUP = "color:#9a78bb"


def chat_html(segments: Iterable[Any], title: str = "") -> Any:
    """Segments of the chat encoding as one HTML box.

    Args:
        segments: objects with ``text``, ``supervised`` (bears loss) and ``markup`` (special tokens).
        title: a line above the box.
    """
    from IPython.display import HTML

    return HTML(chat_key(title) + chat_box((s.text, s.supervised, s.markup) for s in segments))


def chat_key(title: str = "") -> str:
    """What the colours mean, behind a title, as HTML."""
    return (
        f'<div style="font-size:12px;margin-top:4px;color:var(--jp-ui-font-color2,#616e7c)">{html.escape(title)} '
        f'<span style="{_LOSS};{_TEXT};padding:0 4px">bears loss</span> '
        f'<span style="{_MARKUP};padding:0 4px">special token</span></div>'
    )


def chat_box(segments: Iterable[tuple[str, bool, bool]]) -> str:
    """``(text, bears loss, is markup)`` of each segment as an HTML box."""
    parts = []
    for text, supervised, markup in segments:
        style = ";".join(s for s in (_LOSS if supervised else "", _MARKUP if markup else "") if s)
        shown = html.escape(text)
        parts.append(f'<span style="{style}">{shown}</span>' if style else shown)
    return f'<div style="{_BOX}">{"".join(parts)}</div>'
