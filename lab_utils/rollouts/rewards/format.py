"""Whether the answer keeps to the form: it ended, its reasoning is closed once, and it matches a pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lab_utils.data.tokenizer import END_THINK, THINK
from lab_utils.rollouts.rewards import Answer, Row


class Format:
    """1 for an answer in the right form, 0 for any other.

    Args:
        pattern: regular expression that the whole text without surrounding whitespace must match; absent: any text
            that isn't empty.
    """

    def __init__(self, pattern: str | None = None) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL) if pattern else None
        except re.error as error:
            raise ValueError(f"pattern is no regular expression ({error})") from None

    def score(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        return [float(self._right(answer)) for answer in answers]

    def _right(self, answer: Answer) -> bool:
        text = answer.text.strip()
        if not (answer.finished and answer.closed and text):
            return False
        if any(mark in part for mark in (THINK, END_THINK) for part in (answer.text, answer.reasoning)):
            return False
        return self.pattern is None or bool(self.pattern.fullmatch(text))


REWARD = Format
