"""A cache of its own for every session of tests, and sets made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_sets import entry, write_jsonl, write_manifest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Nothing is read from, or left in, the user's cache; the session shares one."""
    monkeypatch.setenv("ASCENT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def make_set(tmp_path):
    """``make_set(rows, format="messages", file="train.jsonl")``: a set on disk; its manifest's path."""

    def make(rows: list, format: str = "messages", file: str = "train.jsonl", **more) -> Path:
        path = write_jsonl(tmp_path / file, rows)
        splits = {"train": {"kind": "file", "files": [entry(path, len(rows))]}}
        return write_manifest(tmp_path, format, splits, **more)

    return make
