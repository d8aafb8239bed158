"""Which of a conversation's text bears loss where one answer is learnt from: of a pair, for a reward, or rejected."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lab_utils.errors import DataError

if TYPE_CHECKING:
    from lab_utils.data.documents import Encoding


def answer_segments(
    prompt: list[dict[str, Any]],
    answer: list[dict[str, Any]],
    tools: Any,
    encoding: Encoding,
    source: str = "",
) -> list[Any]:
    """Segments of a conversation, with loss on ``answer`` and not on what the assistant says in ``prompt``.

    Raises:
        DataError: it cannot be told where the answer begins, as a turn between two of the assistant's is dropped.
    """
    segments, runs = [], 0
    earlier, later = (sum(m["role"] == "assistant" for m in part) for part in (prompt, answer))
    # Whatever the encoding makes of a turn, each of the assistant's is one stretch with loss.
    for supervised, run in groupby(
        encoding.segments([*prompt, *answer], tools, prompt=False), key=lambda s: s.supervised
    ):
        runs += supervised
        bears = supervised and runs > earlier
        segments += [replace(segment, supervised=bears) for segment in run]
    if runs != earlier + later:
        raise DataError(
            f"{source or 'A row'}: expected {earlier + later} turns of the assistant in the encoded text, found "
            f"{runs}: take out the developer message between two of them, or set data.drop_thinking=false."
        )
    return segments
