"""One field of the form: its name, what is typed or chosen, and what it means or what is wrong with it."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as w

from lab_utils.widgets._field import ABSENT, MISSING, Field


@dataclass(frozen=True)
class Shared:
    """Layouts and styles that all fields of a form have in common: a third of the models that it would else have."""

    layout: w.Layout
    html: w.Layout
    html_style: Any
    text_style: Any


def shared() -> Shared:
    return Shared(
        w.Layout(width="auto"),
        w.Layout(width="auto"),
        w.HTML().style,
        w.Text(style={"description_width": "0"}).style,
    )


class Row:
    """The three widgets of a field.

    Args:
        field: what it is of.
        shown: what stands in it at first.
        typed: called with the field and what stands in it now, whenever a person changes it.
        common: layouts and styles.
        known: choices of a field whose schema has none, as a launcher's name.
        whole: show the whole key, where no section stands above it.
    """

    def __init__(
        self,
        field: Field,
        shown: Any,
        typed: Callable[[Field, Any], None],
        common: Shared,
        known: tuple[str, ...] = (),
        whole: bool = False,
    ):
        if known and field.kind == "text":
            field = replace(field, kind="choice", choices=known)
        self.field, self._typed = field, typed
        self._setting = False
        self._help = _help(field)
        self.label = w.HTML(_label(field, whole), layout=common.html, style=common.html_style)
        self.help = w.HTML(self._help, layout=common.html, style=common.html_style).add_class("lab-help")
        self.input = self._make(shown, common)
        self.input.observe(self._observe, "value")
        if field.kind == "yaml":
            self.input.add_class("lab-wide")
            self.help.add_class("lab-wide")

    @property
    def widgets(self) -> tuple[w.Widget, ...]:
        return self.label, self.input, self.help

    def _make(self, shown: Any, common: Shared) -> w.DOMWidget:
        field = self.field
        if field.kind == "choice":
            return w.Dropdown(options=_options(field, shown), value=shown, layout=common.layout)
        if field.kind == "switch":
            return w.Checkbox(value=shown, indent=False, layout=common.layout)
        if field.kind == "yaml":
            return w.Textarea(
                value=shown, rows=_rows(shown), layout=common.layout, placeholder=_placeholder(field)
            )
        return w.Text(
            value=shown, layout=common.layout, style=common.text_style, placeholder=_placeholder(field)
        )

    def _observe(self, change: dict[str, Any]) -> None:
        if not self._setting:
            self._typed(self.field, change["new"])

    def update(self, shown: Any, message: str, changed: bool) -> None:
        """Bring the widgets to what stands in the sheet; only what differs travels to the page."""
        self._setting = True
        try:
            if self.field.kind == "choice" and shown not in (value for _, value in self.input.options):
                self.input.options = _options(self.field, shown)
            if self.input.value != shown:
                self.input.value = shown
            if self.field.kind == "yaml" and self.input.rows != _rows(shown):
                self.input.rows = _rows(shown)
        finally:
            self._setting = False
        text = self._help
        if message:
            # The key stands to the left already.
            said = message.removeprefix(f"{self.field.key}: ")
            limits = (
                f' <span class="lab-limits">{html.escape(self.field.limits)}</span>'
                if self.field.limits
                else ""
            )
            text = f'<span class="lab-message" title="{html.escape(self.field.key)}">{html.escape(said)}</span>{limits}'
        if self.help.value != text:
            self.help.value = text
        for widget in (self.input, self.help):
            _mark(widget, "lab-wrong", bool(message))
        _mark(self.label, "lab-changed", changed)


def fill(box: w.Box, rows: list[Row]) -> None:
    """These rows and no others in a box."""
    children = tuple(widget for row in rows for widget in row.widgets)
    if box.children != children:
        box.children = children


def _mark(widget: w.DOMWidget, name: str, on: bool) -> None:
    if on != (name in widget._dom_classes):
        (widget.add_class if on else widget.remove_class)(name)


def _options(field: Field, shown: Any) -> list[tuple[str, Any]]:
    """Choices by name; a value that is none of them is one more, for the recipe to refuse."""
    values = [*field.choices, *([shown] if shown not in field.choices else [])]
    names = {ABSENT: f"({_text(field.default)})" if field.default not in (None, MISSING) else "–"}
    return [(names.get(value, "") if value == ABSENT else _text(value), value) for value in values]


def _label(field: Field, whole: bool) -> str:
    name = html.escape(field.key if whole else field.key.rpartition(".")[2])
    name = name.replace(".", ".<wbr>").replace("_", "_<wbr>")  # where a narrow page may break it
    return f'<span class="lab-label" title="{html.escape(field.key)}">{name}</span>'


def _help(field: Field) -> str:
    keys = f" Each has {', '.join(field.item_keys)}." if field.item_keys else ""
    told = html.escape(field.meaning + keys)
    limits = f'<span class="lab-limits">{html.escape(field.limits)}</span> ' if field.limits else ""
    return f'<span class="lab-clamp" title="{told}">{limits}{told}</span>'


def _placeholder(field: Field) -> str:
    """What holds where the field is empty."""
    if field.default is MISSING:
        return "needed"
    if field.default is None:
        return "absent"
    return field.show(field.default) or "none"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _rows(shown: str) -> int:
    return min(max(shown.count("\n") + 1, 1), 10)
