"""Data sets that are made rather than stored: a manifest names a generator, its arguments and a seed.

The same name, arguments and seed give the same rows, byte for byte, on every machine and Python version, so a
manifest pins bytes, rows and sha256 of the file that ``write_jsonl`` makes::

    source: {kind: generated, generator: tasks_messages, arguments: {split: train, rows: 16000}, seed: 1}
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab_utils.data.tasks import _compose
from lab_utils.errors import DataError
from lab_utils.registry import nearest

Row = dict[str, Any]
GENERATORS: dict[str, Callable[..., Iterator[Row]]] = {
    "tasks_messages": _compose.messages,
    "tasks_preference": _compose.preference,
    "tasks_prompts": _compose.prompts,
    "tasks_text": _compose.text,
}


def rows(generator: str, arguments: dict[str, Any], seed: int) -> Iterator[Row]:
    """The rows of one generated file.

    Raises:
        DataError: no such generator, or arguments that it doesn't take.
    """
    if generator not in GENERATORS:
        hint = nearest(generator, list(GENERATORS))
        raise DataError(f"There is no data generator '{generator}': {hint}.")
    function = GENERATORS[generator]
    try:
        inspect.signature(function).bind(seed=seed, **arguments)
    except TypeError as error:
        raise DataError(f"Generator '{generator}' {error}: correct the arguments in the manifest.") from None
    return function(seed=seed, **arguments)


def line(row: Row) -> bytes:
    """A row as it stands in a JSONL file."""
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def write_jsonl(path: str | Path, generator: str, arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    """Make the file, whole or not at all; return its ``sha256``, ``bytes`` and ``rows``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size, count = hashlib.sha256(), 0, 0
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as out:
            for row in rows(generator, arguments, seed):
                data = line(row)
                digest.update(data)
                size += len(data)
                count += 1
                out.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return {"sha256": digest.hexdigest(), "bytes": size, "rows": count}
