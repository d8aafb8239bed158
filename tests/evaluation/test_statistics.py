"""Values and intervals of a report against independent formulas."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.evaluation import statistics as s


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_where_the_score_test_just_rejects(case):
    """The interval's definition: |p̂ - p| = z·√(p(1-p)/n) at both ends, unless an end is that of the range."""
    right, n = case
    low, high = s.wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(right / n - bound) == pytest.approx(s.Z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)
    assert (low == 0) == (right == 0) and (high == 1) == (right == n)


def test_wilson_has_the_values_of_a_published_table():
    """Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    table = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, n), expected in table.items():
        assert s.wilson(right, n) == pytest.approx(expected, abs=5e-5)


def test_a_proportion_of_nothing_is_refused():
    for right, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="a proportion needs"):
            s.wilson(right, n)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(case):
    n, right, k = case
    subsets = list(itertools.combinations([i < right for i in range(n)], k))
    assert s.pass_at_k(n, right, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))))


def test_pass_at_k_is_unbiased():
    """Over repeated draws of n samples its mean is 1 - (1 - p)^k, which (right/n)-plug-in is not."""
    draw, p, n, k = random.Random(3), 0.3, 6, 4
    counts = [sum(draw.random() < p for _ in range(n)) for _ in range(20_000)]
    truth = 1 - (1 - p) ** k
    assert np.mean([s.pass_at_k(n, c, k) for c in counts]) == pytest.approx(truth, abs=0.01)
    assert abs(np.mean([1 - (1 - c / n) ** k for c in counts]) - truth) > 0.02


@pytest.mark.parametrize(("n", "right", "k"), [(4, 1, 5), (4, 5, 1), (4, 1, 0), (4, -1, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, right, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        s.pass_at_k(n, right, k)


def test_the_bootstrap_of_a_mean_agrees_with_the_normal_approximation():
    values = np.random.default_rng(0).normal(3, 2, 400)
    value, (low, high) = s.bootstrap_ratio(values, np.ones(400))
    half = s.Z * values.std(ddof=1) / 20
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.25 * half)


def test_the_bootstrap_of_a_ratio_agrees_with_the_delta_method():
    draw = np.random.default_rng(1)
    counts = draw.integers(5, 200, 600).astype(float)
    totals = counts * draw.gamma(4, 0.5, 600)
    value, (low, high) = s.bootstrap_ratio(totals, counts)
    residuals = totals - value * counts
    half = s.Z * residuals.std(ddof=1) * math.sqrt(600) / counts.sum()
    assert value == pytest.approx(totals.sum() / counts.sum())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.3 * half)


@settings(max_examples=10)
@given(st.lists(st.floats(0, 5), min_size=2, max_size=40), st.integers(1, 60))
def test_chunks_of_resamples_change_nothing_but_memory(values, chunk):
    whole = s.bootstrap_ratio(values, [1.0] * len(values))
    kept, s._CHUNK = s._CHUNK, chunk * len(values)
    try:
        assert s.bootstrap_ratio(values, [1.0] * len(values)) == whole
    finally:
        s._CHUNK = kept


def test_a_measure_counts_every_item_once_in_its_family():
    found = s.proportion([True, False, True, True], ["b", "a", "b", "a"])
    assert (found["value"], found["n"]) == (0.75, 4)
    assert list(found["by_family"]) == ["a", "b"]
    assert found["by_family"]["a"] == {"value": 0.5, "interval": s.wilson(1, 2), "n": 2}
    assert s.proportion([], []) is None


def test_perplexity_is_weighted_by_tokens_not_by_documents():
    found = s.perplexity([2.0, 90.0], [1.0, 99.0], ["short", "long"])
    assert found["value"] == pytest.approx(math.exp(0.92)) and found["tokens"] == 100
    assert found["by_family"]["short"] == {"value": pytest.approx(math.exp(2)), "interval": None, "n": 1}
    low, high = found["interval"]
    assert low <= found["value"] <= high


def test_pass_at_k_of_questions_that_all_fail_still_has_a_width():
    found = s.mean_pass_at_k([0] * 20, 4, 2, ["a"] * 20)
    assert found["value"] == 0 and found["interval"] == s.wilson(0, 20)
    mixed = s.mean_pass_at_k([0, 4, 2, 1], 4, 2, ["a"] * 4)
    assert mixed["value"] == pytest.approx((0 + 1 + 5 / 6 + 1 / 2) / 4)
