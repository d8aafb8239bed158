"""A soft punishment of answers that come near the longest allowed length (DAPO, arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lab_utils.rollouts.rewards import Answer, Row


class Length:
    """0 up to ``longest - margin`` tokens, then down in a line to -1 at ``longest``, and -1 beyond.

    Args:
        longest: L_max in tokens, the end token included: one number, or one by reasoning mode.
        margin: L_cache, length of the slope in tokens.
    """

    def __init__(self, longest: int | Mapping[str, int], margin: int) -> None:
        self.longest = dict(longest) if isinstance(longest, Mapping) else int(longest)
        self.margin = int(margin)
        values = self.longest.values() if isinstance(self.longest, dict) else [self.longest]
        if not 0 < self.margin <= min(values, default=0):
            raise ValueError(f"margin={margin} must lie between 1 and longest={longest}")

    def score(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        return [self._one(answer) for answer in answers]

    def _one(self, answer: Answer) -> float:
        longest = self.longest
        if isinstance(longest, dict):
            if answer.mode not in longest:
                return 0.0
            longest = longest[answer.mode]
        return -min(max(len(answer.tokens) - (longest - self.margin), 0) / self.margin, 1.0)


REWARD = Length
EXAMPLE = {"longest": 64, "margin": 16}
