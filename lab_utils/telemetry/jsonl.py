"""Append-only JSON lines that survive a killed writer, and the sink that is always on.

A writer that dies in the middle of a line leaves a torn one. The next ``append`` starts on a fresh line, and
reading skips what does not parse: at most the torn line is lost.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lab_utils.telemetry.names import lookup


def encode(row: dict[str, Any]) -> str:
    """One line of strict JSON. NaN and infinities, which JSON lacks, become text that ``float()`` reads."""
    plain = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def open_for_append(path: Path) -> IO[str]:
    """``path`` opened at its end, on a line of its own even where the last writer was killed inside one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = False
    if path.exists() and path.stat().st_size:
        with path.open("rb") as existing:
            existing.seek(-1, os.SEEK_END)
            torn = existing.read(1) != b"\n"
    stream = path.open("a", encoding="utf-8")
    if torn:
        stream.write("\n")
    return stream


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line to ``path`` in one write."""
    with open_for_append(path) as stream:
        stream.write(encode(row))


def parse(line: bytes | str) -> dict[str, Any] | None:
    """The row of a line, or None for a torn or empty one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole row of ``path``; a missing file has none."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        for line in stream:
            if (row := parse(line)) is not None:
                yield row


def newest(path: Path, size: int) -> tuple[list[dict[str, Any]], bool]:
    """The whole rows among the last ``size`` bytes, and whether that was the whole file; a missing file has none."""
    try:
        with path.open("rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            start = stream.seek(max(0, end - size))
            lines = stream.read().split(b"\n")
    except OSError:
        return [], True
    # The first piece may be half a row, unless it starts the file.
    found = map(parse, lines[1:] if start else lines)
    return [row for row in found if row is not None], start == 0


class Tail:
    """Rows that were added since the last look, for a live view of a file that is still being written."""

    def __init__(self, path: Path):
        self.path = path
        self._offset = 0

    def rows(self) -> list[dict[str, Any]]:
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                whole, newline, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(whole) + len(newline)
        return [row for line in whole.split(b"\n") if (row := parse(line)) is not None]


class JsonlSink:
    """``metrics.jsonl``: one line a logged step, the record that everything else can be made from again.

    Each line is flushed to the kernel at once, so it survives a killed process; it is forced to the disk
    every ``sync_seconds``, so a machine that loses power loses no more than that. Events go to
    ``events.jsonl``.
    """

    def __init__(self, sync_seconds: float = 5.0):
        self.sync_seconds = sync_seconds
        self.unknown: set[str] = set()
        self._stream: IO[str] | None = None
        self._synced = 0.0

    def open(self, run_dir: Path, recipe: Any, provenance: dict[str, Any]) -> None:
        self._events = Path(run_dir) / "events.jsonl"
        self._stream = open_for_append(Path(run_dir) / "metrics.jsonl")

    def log(self, step: int, values: dict[str, float]) -> None:
        assert self._stream is not None, "open() first"
        for key in values:
            if key not in self.unknown and lookup(key) is None:
                self.unknown.add(key)
                self.event(
                    "unknown_metric", f"Metric '{key}' is not described in telemetry/names.py: add it there."
                )
        self._stream.write(encode({"step": step, "time": round(time.time(), 3), **values}))
        self._stream.flush()
        if time.monotonic() - self._synced > self.sync_seconds:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def event(self, kind: str, message: str) -> None:
        append(self._events, {"time": round(time.time(), 3), "kind": kind, "message": message})

    def close(self, state: str) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None
