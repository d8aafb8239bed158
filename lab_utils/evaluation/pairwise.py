"""Which of two models answers better: wins, ties and losses by the verifier, or by a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lab_utils.evaluation import statistics
from lab_utils.evaluation.answering import is_right
from lab_utils.evaluation.statistics import Measure
from lab_utils.rollouts.rewards import Answer

Verdict = Literal["win", "tie", "loss"]
WORTH = {"win": 1.0, "tie": 0.5, "loss": 0.0}


def exact_verdicts(
    rows: Sequence[dict[str, Any]], ours: Sequence[Answer], theirs: Sequence[Answer]
) -> list[Verdict | None]:
    """A win where ours is right and theirs is wrong, a loss the other way round; None without a verifier."""
    verdicts: list[Verdict | None] = []
    for row, mine, other in zip(rows, ours, theirs, strict=True):
        if not row.get("verify"):
            verdicts.append(None)
            continue
        gap = int(bool(is_right(row, mine.text))) - int(bool(is_right(row, other.text)))
        verdicts.append("win" if gap > 0 else "loss" if gap < 0 else "tie")
    return verdicts


def win_rate(verdicts: Sequence[Verdict | None], families: Sequence[str]) -> Measure | None:
    """(wins + ties / 2) / n with Wilson's interval, the counts, and the share of wins among the decided.

    Wilson's width is that of plain wins and losses; ties vary less, so with many of them it is a bound.
    """
    judged = [(verdict, family) for verdict, family in zip(verdicts, families, strict=True) if verdict]
    found = statistics.proportion([WORTH[v] for v, _ in judged], [f for _, f in judged])
    if not found:
        return None
    for family, row in [(None, found), *found["by_family"].items()]:
        some = [v for v, f in judged if family in (None, f)]
        row |= {name: some.count(name) for name in WORTH}
    decided = [(v == "win", f) for v, f in judged if v != "tie"]
    found["decided"] = statistics.proportion([w for w, _ in decided], [f for _, f in decided])
    return found
