"""Rows of a data set as the model sees them: what bears loss, what is markup, how many tokens. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from lab_utils.data.answers import answer_segments
from lab_utils.data.encoding import Segment

if TYPE_CHECKING:
    from lab_utils.data.documents import Encoding
    from lab_utils.data.manifest import Manifest


@dataclass(frozen=True)
class Seen:
    """One row.

    Attributes:
        place: where it stands: ``train.jsonl line 7``.
        parts: segments by name: ``text``, ``messages``, or ``chosen`` and ``rejected``.
        tokens: of all parts.
        with_loss: tokens of them that bear loss.
    """

    place: str
    parts: dict[str, list[Segment]]
    tokens: int
    with_loss: int


def rows_as_seen(
    manifest: Manifest, split: str, encoding: Encoding, *, start: int = 1, rows: int = 3
) -> Iterator[Seen]:
    """Rows of a split from the ``start``-th on, counted from 1; fewer where it ends.

    Raises:
        DataError: the data is not what the manifest says, or a row cannot be encoded.
    """
    for place, row in islice(manifest.located_rows(split), start - 1, start - 1 + rows):
        tools = row.get("tools")
        if manifest.format == "text":
            parts = {"text": [Segment(row["text"], True, False)]}
            count = len(encoding.tokenizer.encode(row["text"]))
            yield Seen(place, parts, count + 2, count + 1)  # begin and end token; the first bears no loss
            continue
        if manifest.format == "preference":
            parts = {
                side: answer_segments(row["prompt"], row[side], tools, encoding, place)
                for side in ("chosen", "rejected")
            }
        else:
            parts = {
                "messages": encoding.segments(row["messages"], tools, prompt=manifest.format == "prompt")
            }
        bears = [each for segments in parts.values() for each in encoding.tokens(segments)[1]]
        yield Seen(place, parts, len(bears), sum(bears))
