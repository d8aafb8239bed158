"""Rewards to advantages: by hand, against the papers' formulas, and in parts that add up."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.errors import RunError
from lab_utils.rollouts.advantages import (
    EPSILON,
    Spread,
    advantages,
    length_penalties,
    reward_metrics,
    total_rewards,
)
from lab_utils.telemetry.names import lookup
from lab_utils.telemetry.reductions import reduce_metrics

BASELINES, SCALES = ("group_mean", "leave_one_out", "none"), ("group", "batch", "none")


def test_the_hand_case():
    """Two prompts, answers mixed: rewards 1 0 0 1 of one, 3 1 of the other."""
    rewards, groups = [1, 3, 0, 0, 1, 1], [7, 9, 7, 7, 9, 7]
    plain = advantages(rewards, groups, scale="none")
    assert plain.values.tolist() == [0.5, 1, -0.5, -0.5, -1, 0.5]
    assert not plain.uniform.any()
    others = advantages(rewards, groups, baseline="leave_one_out", scale="none").values
    assert others == pytest.approx([2 / 3, 2, -2 / 3, -2 / 3, -2, 2 / 3])
    scaled = advantages(rewards, groups).values
    first, second = math.sqrt(1 / 3), math.sqrt(2)
    assert scaled == pytest.approx(
        [0.5 / first, 1 / second, -0.5 / first, -0.5 / first, -1 / second, 0.5 / first], rel=2e-4
    )
    assert advantages(rewards, groups, baseline="none", scale="none").values.tolist() == rewards


@st.composite
def rounds(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    groups = [10 * i for i, size in enumerate(sizes) for _ in range(size)]
    rewards = [draw(st.sampled_from([0.0, 0.1, 0.3, 1.0, -2.0])) for _ in groups]
    order = draw(st.permutations(range(len(groups))))
    return [rewards[i] for i in order], [groups[i] for i in order]


def by_formula(rewards: list[float], groups: list[int], baseline: str, scale: str) -> list[float]:
    """One answer at a time, with Python's own statistics."""
    found = []
    batch = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    for i, reward in enumerate(rewards):
        mates = [r for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
        others = [
            r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == groups[i] and j != i
        ]
        value = reward
        if baseline == "group_mean":
            value -= statistics.fmean(mates)
        elif baseline == "leave_one_out":
            value -= statistics.fmean(others or mates)
        spread = {"group": statistics.stdev(mates) if others else 0.0, "batch": batch, "none": 0.0}[scale]
        found.append(value / (spread + EPSILON) if spread > 1e-12 else value)
    return found


@settings(max_examples=60, deadline=None)
@given(rounds(), st.sampled_from(BASELINES), st.sampled_from(SCALES))
def test_advantages_are_the_formulas(drawn, baseline, scale):
    rewards, groups = drawn
    found = advantages(rewards, groups, baseline=baseline, scale=scale)
    assert found.values == pytest.approx(by_formula(rewards, groups, baseline, scale), rel=1e-9, abs=1e-9)
    alike = {g: {r for r, other in zip(rewards, groups, strict=True) if other == g} for g in groups}
    assert found.uniform.tolist() == [len(alike[g]) == 1 for g in groups]
    if baseline != "none":
        assert not found.values[found.uniform].any(), "exactly 0, whatever rounding leaves"
        for g in set(groups):
            assert found.values[np.array(groups) == g].sum() == pytest.approx(0, abs=1e-8)


def test_equal_sums_that_round_differently_are_one_reward():
    rewards = [0.1 + 0.2, 0.3, 0.3]  # 0.30000000000000004
    found = advantages(rewards, [0, 0, 0])
    assert found.uniform.all() and not found.values.any()
    near = advantages([0.3, 0.3 + 1e-6, 0.3], [0, 0, 0])
    assert not near.uniform.any() and abs(near.values).max() < 0.01, "noise is not blown up to a signal"


@pytest.mark.parametrize("reward", [0.3, -1e3, 0.0])
def test_a_batch_of_one_reward_has_no_spread(reward):
    assert Spread.of([reward] * 300).std == 0.0
    assert advantages([reward] * 3, [0, 1, 1], baseline="none", scale="batch").values == pytest.approx(
        [reward] * 3
    )


def test_under_scale_batch_the_ranks_spreads_add_up():
    rng = np.random.default_rng(0)
    rewards, groups = rng.normal(3, 2, 24), np.repeat(np.arange(6), 4)
    whole = advantages(rewards, groups, scale="batch").values
    halves = [slice(0, 8), slice(8, 24)]
    together = Spread.of(rewards[halves[0]]).merge(Spread.of(rewards[halves[1]]))
    assert together.std == pytest.approx(statistics.stdev(rewards))
    parts = [advantages(rewards[h], groups[h], scale="batch", batch=together).values for h in halves]
    assert np.concatenate(parts) == pytest.approx(whole)


def test_a_rank_without_answers_takes_part():
    assert advantages([], []).values.size == 0
    assert Spread.of([]).merge(Spread.of([1.0, 3.0])).std == pytest.approx(math.sqrt(2))
    found = reduce_metrics(
        [reward_metrics([], [], {"exact": []}), reward_metrics([1, 0], [0, 0], {"exact": [1, 0]})]
    )
    assert found["reward"].value == 0.5 and found["rewards/exact/mean"].value == 0.5


def test_rewards_are_weighed_and_penalties_taken_off():
    scores = {"exact": [1, 0, math.nan], "format": [1, 1, 0.5]}
    totals = total_rewards(scores, {"exact": 2.0, "format": 0.1})
    assert totals == pytest.approx([2.1, 0.1, 0.05])
    rollout = SimpleNamespace(
        length_penalty={"thinking": 0.5}, length_budgets={"thinking": 200}, max_new_tokens=100
    )
    penalties = length_penalties([50, 100, 80], ["thinking", "thinking", "chat"], rollout)
    assert penalties.tolist() == [0.125, 0.25, 0.0]
    assert total_rewards(scores, {"exact": 2.0, "format": 0.1}, penalties) == pytest.approx(
        [1.975, -0.15, 0.05]
    )
    rollout.length_budgets = {}
    assert length_penalties([50], ["thinking"], rollout).tolist() == [0.25], (
        "without a budget, the longest answer"
    )


def test_metrics_of_ranks_add_up_to_those_of_the_round():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(6), 4)
    scores = {"exact": rng.integers(0, 2, 24).astype(float), "judge": rng.normal(size=24)}
    scores["exact"][:4] = 1.0
    scores["judge"][:4] = 0.0
    scores["judge"][5] = math.nan  # no answer from the judge
    penalties = np.where(groups > 0, rng.random(24), 0.0)
    rewards = total_rewards(scores, {"exact": 1.0, "judge": 0.5}, penalties)

    def part(chosen: slice) -> dict:
        some = {name: values[chosen] for name, values in scores.items()}
        return reward_metrics(rewards[chosen], groups[chosen], some, penalties[chosen])

    whole = {name: metric.value for name, metric in part(slice(None)).items()}
    halves = reduce_metrics([part(slice(0, 8)), part(slice(8, 24))])
    assert {name: metric.value for name, metric in halves.items()} == pytest.approx(whole)
    spreads = [statistics.stdev(rewards[groups == g]) for g in range(6)]
    known = scores["judge"][~np.isnan(scores["judge"])]
    assert whole["reward"] == pytest.approx(rewards.mean())
    assert whole["reward_std"] == pytest.approx(statistics.fmean(spreads), abs=1e-9)
    assert whole["frac_reward_zero_std"] == pytest.approx(1 / 6)
    assert whole["rewards/exact/mean"] == pytest.approx(scores["exact"].mean())
    assert whole["rewards/judge/mean"] == pytest.approx(known.mean())
    assert whole["rewards/length_penalty/mean"] == pytest.approx(-penalties.mean())
    spreads = [statistics.stdev(scores["exact"][groups == g]) for g in range(6)]
    assert whole["rewards/exact/std"] == pytest.approx(statistics.fmean(spreads))
    assert all(lookup(f"train/{leaf}") is not None for leaf in whole)
    assert "rewards/length_penalty/mean" not in reward_metrics(rewards, groups, scores, np.zeros(24))


def test_what_makes_no_sense_is_one_clear_sentence():
    with pytest.raises(RunError, match="Answer 1 of the round got no score from exact, judge"):
        total_rewards({"exact": [1, math.nan], "judge": [math.nan, math.nan]}, {"exact": 1, "judge": 1})
    with pytest.raises(RunError, match="reward of answer 1 of the round is inf"):
        advantages([0, math.inf], [0, 0])
    with pytest.raises(ValueError, match="baseline=mean"):
        advantages([0], [0], baseline="mean")
    with pytest.raises(ValueError, match="2 rewards for 3 answers"):
        advantages([0, 1], [0, 0, 0])
