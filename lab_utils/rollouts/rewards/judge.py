"""What a judge thinks of the answer: a model reads it beside a rubric and gives a score from 1 to 10."""

from __future__ import annotations

from collections.abc import Sequence

from lab_utils.rollouts import judge
from lab_utils.rollouts.rewards import Answer, Ask, Row


class Judge:
    """The judge's score on a scale from 0 to 1.

    Args:
        ask: replies to conversations: the policy itself, or a server.
        rubric: what a good answer is, in words; absent: ``row["rubric"]``, or a general one.
        unparsed: score of an answer whose judge gave none.
    """

    def __init__(self, ask: Ask, rubric: str | None = None, unparsed: float = 0.0) -> None:
        self.ask, self.rubric, self.unparsed = ask, rubric, float(unparsed)

    def score(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """Asked once for all answers, and also for none: ranks that sample in lockstep ask together."""
        prompts = [
            judge.score_messages(row, a.text, self.rubric) for row, a in zip(rows, answers, strict=True)
        ]
        scores = [judge.parse_score(reply) for reply in self.ask(prompts)]
        return [self.unparsed if score is None else judge.on_unit_scale(score) for score in scores]


REWARD = Judge
