"""Numbers with their uncertainty: every figure of a report carries a 95% interval and the size it rests on.

A *measure* is ``{"value", "interval": [low, high], "n", "by_family": {family: {"value", "interval", "n"}}}``.

* Proportions: Wilson's score interval (Wilson 1927), which stays sensible at 0, at 1 and for few questions.
* Means over questions, ratios of sums over documents: percentile bootstrap (Efron 1979), 2,000 resamples of whole
  questions or documents from a fixed seed: the same data give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Z = 1.959963984540054  # 97.5% quantile of the standard normal
RESAMPLES, SEED = 2000, 20_240_601
_CHUNK = 4_000_000  # drawn indices held at a time

Measure = dict[str, Any]
Estimate = tuple[float, list[float] | None]


def wilson(successes: float, n: int) -> list[float]:
    """Wilson's 95% interval of a proportion; ``successes`` may be fractional (a tie is half a win).

    Raises:
        ValueError: n is 0, or successes lie outside 0 … n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 ≤ successes ≤ n and n ≥ 1, got {successes} of {n}")
    share, z2 = successes / n, Z * Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return [low, high]


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, section 2.1).

    1 - C(n - right, k) / C(n, k), as a product.

    Args:
        n: samples drawn.
        right: how many of them are right.
        k: 1 … n.

    Raises:
        ValueError: k or right lie outside their range.
    """
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ n and 0 ≤ right ≤ n, got k={k}, n={n}, right={right}")
    if n - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - right + 1, n + 1))


def bootstrap_ratio(totals: Sequence[float], counts: Sequence[float]) -> Estimate:
    """Σ totals / Σ counts with its percentile interval over resampled items; no interval from a single item.

    With counts of 1 it is the mean.
    """
    total_N, count_N = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
    value = float(total_N.sum() / count_N.sum())
    n = len(total_N)
    if n < 2:
        return value, None
    draw = np.random.default_rng(SEED)
    per_chunk = max(1, _CHUNK // n)
    found = []
    for start in range(0, RESAMPLES, per_chunk):
        picked = draw.integers(0, n, (min(per_chunk, RESAMPLES - start), n))
        found.append(total_N[picked].sum(1) / count_N[picked].sum(1))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return value, [float(low), float(high)]


# -- measures ------------------------------------------------------------------------------------------------


def measure(
    items: Sequence[Any], families: Sequence[str], estimate: Callable[[list[Any]], Estimate]
) -> Measure | None:
    """A measure over items, and over those of each family; None where there is no item."""
    if not items:
        return None
    grouped: dict[str, list[Any]] = {}
    for item, family in zip(items, families, strict=True):
        grouped.setdefault(family, []).append(item)
    return _row(list(items), estimate) | {
        "by_family": {family: _row(grouped[family], estimate) for family in sorted(grouped)}
    }


def proportion(flags: Sequence[float], families: Sequence[str]) -> Measure | None:
    """The share of flags that hold, with Wilson's interval; a flag may be 0.5."""
    return measure(flags, families, lambda some: (sum(some) / len(some), wilson(sum(some), len(some))))


def mean(values: Sequence[float], families: Sequence[str]) -> Measure | None:
    """The mean over questions, with a bootstrap interval."""
    return measure(values, families, lambda some: bootstrap_ratio(some, [1.0] * len(some)))


def mean_pass_at_k(right: Sequence[int], samples: int, k: int, families: Sequence[str]) -> Measure | None:
    """pass@k over questions, each of which ``samples`` answers were drawn for.

    The interval is the bootstrap's over questions. Where all of them have one value the resamples cannot differ, and it
    is Wilson's for that share of the questions: a bound, for no variable in 0 … 1 varies more than a yes or no.
    """

    def estimate(some: list[float]) -> Estimate:
        value, interval = bootstrap_ratio(some, [1.0] * len(some))
        return value, wilson(min(sum(some), len(some)), len(some)) if len(set(some)) == 1 else interval

    return measure([pass_at_k(samples, c, k) for c in right], families, estimate)


def perplexity(nats: Sequence[float], tokens: Sequence[float], families: Sequence[str]) -> Measure | None:
    """exp(Σ nats / Σ tokens) over documents, with a bootstrap interval over them.

    Args:
        nats: negative log-likelihood of each document's tokens with weight.
        tokens: the sum of their weights.
        families: of each document.
    """

    def estimate(some: list[tuple[float, float]]) -> Estimate:
        value, interval = bootstrap_ratio(*zip(*some))
        return _exp(value), interval and [_exp(bound) for bound in interval]

    found = measure(list(zip(nats, tokens)), families, estimate)
    return found and found | {"tokens": float(sum(tokens))}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # an untrained model's worst document must not overflow


def _row(items: list[Any], estimate: Callable[[list[Any]], Estimate]) -> Measure:
    value, interval = estimate(items)
    return {"value": value, "interval": interval, "n": len(items)}
