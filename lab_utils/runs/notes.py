"""What people write at a run: a note and tags, in ``<run>/notes.json``; nothing of the run depends on them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lab_utils.errors import RunError
from lab_utils.runs.directory import read_json, write_atomic

FILE = "notes.json"
_TAG = re.compile(r"[\w.:/+-]+")


@dataclass(frozen=True)
class Notes:
    """A free text, and words to find the run by."""

    text: str = ""
    tags: tuple[str, ...] = ()


def read(run: Path) -> Notes:
    """The notes of a run directory; empty where there are none or they cannot be read."""
    found = read_json(run / FILE)
    text, tags = found.get("text"), found.get("tags")
    return Notes(
        text if isinstance(text, str) else "",
        tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else (),
    )


def change(run: Path, *, text: str | None = None, tags: Iterable[str] | None = None) -> Notes:
    """Write a note, tags or both; what isn't given stays.

    Raises:
        RunError: a tag that is no single word, or the directory cannot be written.
    """
    notes = read(run)
    if text is not None:
        notes = replace(notes, text=text.strip())
    if tags is not None:
        notes = replace(notes, tags=words(tags))
    try:
        write_atomic(run / FILE, json.dumps(asdict(notes), ensure_ascii=False, indent=1))
    except OSError as error:
        raise RunError(
            f"The notes of {run.name} cannot be written ({error.strerror or error}): only its owner may."
        ) from None
    return notes


def words(tags: Any) -> tuple[str, ...]:
    """Tags without repeats, in their order; a text is taken apart at commas and blanks."""
    given = re.split(r"[,\s]+", tags) if isinstance(tags, str) else list(tags)
    for tag in given:
        if tag and not _TAG.fullmatch(tag):
            raise RunError(f"'{tag}' is no tag: use letters, digits and _ . : / + - without blanks.")
    return tuple(dict.fromkeys(tag for tag in given if tag))
