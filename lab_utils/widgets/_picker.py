"""Recipes to begin with: the named ones and the YAML files of the working folder, with a search."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten

import ipywidgets as w

from lab_utils.registry import load, members

MEMBERS = "lab_utils.recipes"
LOOKED_AT = 65536  # characters of a YAML file, to tell whether it is a recipe
SHOWN = 5  # lines of the list
LETTERS = 92  # of a line


def known() -> list[tuple[str, str]]:
    """``(name or path, what it is)`` of every recipe that can be picked here."""
    named = [(name, (load(MEMBERS, name).__doc__ or "").strip().splitlines()[0]) for name in members(MEMBERS)]
    files = sorted(path for pattern in ("*.yaml", "*.yml") for path in Path().glob(pattern))
    return [*named, *((str(path), about) for path in files if (about := _about(path)) is not None)]


def _about(path: Path) -> str | None:
    """What a YAML file is: its first comment, or its kind; None where it is no recipe."""
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(LOOKED_AT)
    except (OSError, UnicodeDecodeError):
        return None
    if not re.search(r"^data:\s*(#.*)?$", text, re.MULTILINE) or "train:" not in text:
        return None
    if comment := re.match(r"\s*#+\s*(.+)", text):
        return comment[1].strip()
    kind = re.search(r"^\s+kind:\s*(sft|preference|reward|grpo|distill)\b", text, re.MULTILINE)
    return f"a file of this folder{f', {kind[1]}' if kind else ''}"


class Picker:
    """A search field over a list; ``picked`` is called with the name or path that a person chooses."""

    def __init__(self, picked: Callable[[str], None], name: str):
        self._picked, self._setting = picked, False
        self.search = w.Text(
            placeholder="Search recipes", continuous_update=True, layout=w.Layout(width="auto")
        )
        self.list = w.Select(rows=SHOWN, layout=w.Layout(width="auto"))
        self.widget = w.VBox((self.search, self.list)).add_class("lab-picker")
        self.search.observe(lambda _: self.show(self._name), "value")
        self.list.observe(self._choose, "value")
        self.show(name)

    def show(self, name: str) -> None:
        """List what fits the search, and stand on ``name`` if it is among it."""
        self._name = name
        words = self.search.value.lower().split()
        options = [
            (shorten(f"{source} – {about}", LETTERS, placeholder=" …"), source)
            for source, about in known()
            if all(word in f"{source} {about}".lower() for word in words)
        ]
        self._setting = True
        try:
            if list(self.list.options) != options:
                self.list.options = options
            here = name if name in dict(options).values() else None
            if self.list.value != here:
                self.list.value = here
        finally:
            self._setting = False

    def _choose(self, change: dict) -> None:
        if not self._setting and change["new"] is not None:
            self._name = change["new"]
            self._picked(change["new"])
