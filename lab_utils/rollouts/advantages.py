"""From rewards to advantages: what each answer of a round is worth against the others to its prompt.

Plain arithmetic on the host, in float64. Shapes: A answers of this rank, whole groups together; G groups, one a prompt,
told apart by any integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab_utils.errors import RunError
from lab_utils.telemetry.reductions import Mean, Metric

# Added to a standard deviation before dividing, as TRL does: nearly equal rewards are not blown up to differences.
EPSILON = 1e-4
# Rewards whose range is within this, relative to the largest, are one reward: sums of weighted parts round differently.
SAME = 1e-9
# Share of a sum of squares below which a difference of such sums is taken for rounding: deviations of 1e-6 and less.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Spread:
    """Moments of some rewards, which ranks add up: the standard deviation under ``scale=batch`` is over all of them."""

    count: float
    total: float
    squares: float

    @classmethod
    def of(cls, rewards_A: Sequence[float]) -> Spread:
        values = np.asarray(rewards_A, dtype=np.float64)
        return cls(float(values.size), float(values.sum()), float((values**2).sum()))

    def merge(self, other: Spread) -> Spread:
        return Spread(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def std(self) -> float:
        """Sample standard deviation (over n - 1); 0 for fewer than two rewards."""
        if self.count < 2:
            return 0.0
        around_mean = self.squares - self.total**2 / self.count
        # The difference of two large sums: what is left of equal rewards is rounding, and no spread.
        return math.sqrt(around_mean / (self.count - 1)) if around_mean > ROUNDING * self.squares else 0.0


@dataclass(frozen=True)
class Advantages:
    """``values`` float64 [A]; ``uniform`` bool [A]: the answer's group has one reward throughout, or one answer."""

    values: np.ndarray
    uniform: np.ndarray


def advantages(
    rewards_A: Sequence[float],
    groups_A: Sequence[int],
    *,
    baseline: str = "group_mean",
    scale: str = "group",
    batch: Spread | None = None,
) -> Advantages:
    """Advantage of each answer: its reward less the baseline, over a standard deviation plus ``EPSILON``.

    Args:
        rewards_A: reward of each answer.
        groups_A: the group that each answer belongs to; a group's answers need not be neighbours.
        baseline: group_mean (GRPO, arXiv 2402.03300 §4.1.2), leave_one_out: the mean of the group's other answers
            (RLOO, arXiv 2402.14740), or none.
        scale: group: standard deviation of the group's rewards; batch: of all rewards; none (Dr. GRPO, 2503.20783).
        batch: with ``scale=batch``, the spread over all ranks; absent: these rewards are all there are.

    Under a baseline, an answer of a uniform group has advantage 0 exactly, whatever rounding leaves of the difference.

    Raises:
        ValueError: an unknown baseline or scale, or arrays of two lengths.
        RunError: a reward is not finite.
    """
    if baseline not in ("group_mean", "leave_one_out", "none") or scale not in ("group", "batch", "none"):
        raise ValueError(
            f"advantages: baseline={baseline}, scale={scale} are unknown; choose group_mean, leave_one_out or none, "
            "and group, batch or none."
        )
    rewards, group, sizes = _grouped(rewards_A, groups_A)
    uniform = _uniform(rewards, group, sizes)[group]
    size = sizes[group]
    mean = (np.bincount(group, rewards) / sizes)[group]
    if baseline == "group_mean":
        values = rewards - mean
    elif baseline == "leave_one_out":
        # r - (Σ - r)/(n - 1) = (r - mean)·n/(n - 1)
        values = (rewards - mean) * size / np.maximum(size - 1, 1)
    else:
        values = rewards.copy()
    if baseline != "none":
        values[uniform] = 0.0
    if scale == "group":
        # No spread to divide by: without a baseline such a group keeps its rewards as they are.
        values = values / np.where(uniform, 1.0, _stds(rewards, group, sizes)[group] + EPSILON)
    elif scale == "batch":
        std = (batch or Spread.of(rewards)).std
        values = values / (std + EPSILON if std > 0 else 1.0)
    return Advantages(values, uniform)


def total_rewards(
    scores: Mapping[str, Sequence[float]],
    weights: Mapping[str, float],
    penalties_A: Sequence[float] | None = None,
) -> np.ndarray:
    """Reward of each answer, ``[A]``: Σ weight · score, less its length penalty.

    Args:
        scores: of each reward function, one number an answer; NaN where it has nothing to say about that answer.
        weights: of each of those functions.
        penalties_A: see ``length_penalties``.

    Raises:
        RunError: an answer that no reward function scored.
    """
    table = np.array([np.asarray(scores[name], dtype=np.float64) for name in scores])
    silent = np.isnan(table).all(0)
    if silent.any():
        raise RunError(
            f"Answer {int(silent.argmax())} of the round got no score from {', '.join(scores)}: at least one reward "
            "must apply to every prompt; check objective.rewards against the data."
        )
    weight = np.array([weights[name] for name in scores])
    total = (weight[:, None] * np.where(np.isnan(table), 0.0, table)).sum(0)
    return total if penalties_A is None else total - np.asarray(penalties_A, dtype=np.float64)


def length_penalties(lengths_A: Sequence[int], modes_A: Sequence[str], rollout: Any) -> np.ndarray:
    """What an answer's length costs it, ``[A]``: its mode's penalty × length / the mode's budget.

    Args:
        lengths_A: tokens sampled for each answer.
        modes_A: reasoning mode of each.
        rollout: the recipe's section: ``length_penalty`` and ``length_budgets`` by mode, ``max_new_tokens``.
    """
    rates = [
        rollout.length_penalty.get(mode, 0.0) / rollout.length_budgets.get(mode, rollout.max_new_tokens)
        for mode in modes_A
    ]
    return np.asarray(lengths_A, dtype=np.float64) * np.array(rates, dtype=np.float64)


def reward_metrics(
    rewards_A: Sequence[float],
    groups_A: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    penalties_A: Sequence[float] | None = None,
) -> dict[str, Metric]:
    """Metrics of a round by their leaf, as totals with counts: those of several ranks merge into the whole round's.

    A standard deviation is one within a group, and its mean over groups: it says how much the answers to a prompt
    differ, not the prompts, and it adds up over ranks. Scores that are NaN don't count. A penalty that isn't 0
    throughout is shown as a reward named ``length_penalty``, negative.
    """
    rewards, group, sizes = _grouped(rewards_A, groups_A)
    uniform = _uniform(rewards, group, sizes)
    mean, std = _mean_and_std(rewards, group)
    metrics: dict[str, Metric] = {
        "reward": mean,
        "reward_std": std,
        "frac_reward_zero_std": Mean(float(uniform.sum()), float(len(sizes))),
    }
    parts = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    if penalties_A is not None and np.any(penalties_A):
        parts["length_penalty"] = -np.asarray(penalties_A, dtype=np.float64)
    for name, values in parts.items():
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = _mean_and_std(values, group)
    return metrics


def _grouped(
    rewards_A: Sequence[float], groups_A: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards [A] in float64, group of each answer [A] numbered from 0, answers of each group [G]."""
    rewards = np.asarray(rewards_A, dtype=np.float64)
    _, group, sizes = np.unique(np.asarray(groups_A), return_inverse=True, return_counts=True)
    if rewards.shape != group.shape:
        raise ValueError(f"advantages: {rewards.size} rewards for {group.size} answers; give one each.")
    bad = ~np.isfinite(rewards)
    if bad.any():
        raise RunError(
            f"The reward of answer {int(bad.argmax())} of the round is {rewards[bad][0]}: expected a finite number; "
            "correct the reward function."
        )
    return rewards, group, sizes


def _uniform(rewards: np.ndarray, group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which groups [G] have one reward throughout, up to rounding."""
    low, high = np.full(len(sizes), np.inf), np.full(len(sizes), -np.inf)
    np.minimum.at(low, group, rewards)
    np.maximum.at(high, group, rewards)
    return high - low <= SAME * np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))


def _stds(rewards: np.ndarray, group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Sample standard deviation of each group [G]; 0 for a group of one."""
    mean = np.bincount(group, rewards) / sizes
    squares = np.bincount(group, (rewards - mean[group]) ** 2)
    return np.sqrt(squares / np.maximum(sizes - 1, 1))


def _mean_and_std(values: np.ndarray, group: np.ndarray) -> tuple[Mean, Mean]:
    """Mean over answers, and mean over groups of the standard deviation within; NaN values left out."""
    known = ~np.isnan(values)
    values = values[known]
    _, group, sizes = np.unique(group[known], return_inverse=True, return_counts=True)
    stds = _stds(values, group, sizes) if len(sizes) else np.zeros(0)
    return Mean(float(values.sum()), float(values.size)), Mean(float(stds.sum()), float(len(sizes)))
