"""Whether the answer is right, by the verifier of the row's task family."""

from __future__ import annotations

from collections.abc import Sequence

from lab_utils.data.tasks import verify_row
from lab_utils.rollouts.rewards import SILENT, Answer, Row


class Exact:
    """1 for a right answer, 0 for a wrong one; one that was cut off is wrong.

    Args:
        wrong: score of a wrong answer.
    """

    def __init__(self, wrong: float = 0.0) -> None:
        self.wrong = float(wrong)

    def score(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        return [self._one(row, answer) for row, answer in zip(rows, answers, strict=True)]

    def _one(self, row: Row, answer: Answer) -> float:
        if not row.get("verify"):
            return SILENT
        return 1.0 if answer.finished and answer.closed and verify_row(row, answer.text) else self.wrong


REWARD = Exact
