"""What runs in the browser: each widget's module, behind the few functions that all of them share."""

from __future__ import annotations

from pathlib import Path

STATIC = Path(__file__).parent / "static"


def script(name: str) -> str:
    """An ES module: a page takes it as one text, which imports nothing."""
    return "\n".join(_read(f"{part}.js") for part in ("dom", name))


def style(name: str) -> str:
    return _read(f"{name}.css")


def _read(file: str) -> str:
    return (STATIC / file).read_text(encoding="utf-8")
