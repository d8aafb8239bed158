"""How well a judge judges: agreement of the score or verdict in its answer with what is known of the judged answers.

For the rows of ``judge.judge_rows``: the judge is trained by the same loop as the policy that it judges.
"""

from __future__ import annotations

from collections.abc import Sequence

from lab_utils.rollouts import judge
from lab_utils.rollouts.rewards import SILENT, Answer, Row


class Judgement:
    """1 for full agreement; a score that is off loses in proportion, a verdict is right or wrong. No verdict: 0."""

    def score(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        return [self._one(row.get("judgement"), answer) for row, answer in zip(rows, answers, strict=True)]

    def _one(self, known: dict | None, answer: Answer) -> float:
        if not known:
            return SILENT
        if not answer.closed:
            return 0.0
        if known["kind"] == "compare":
            return float(judge.parse_verdict(answer.text) == known["label"])
        score = judge.parse_score(answer.text)
        return (
            0.0
            if score is None
            else 1.0 - abs(judge.on_unit_scale(score) - judge.on_unit_scale(known["label"]))
        )


REWARD = Judgement
