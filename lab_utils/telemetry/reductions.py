"""Typed metrics: a value together with the rule that combines it over micro-batches, ranks and steps.

A mean carries its total and its count, so that means are never averaged: 7 tokens on one rank and 900 on
another give the mean over 907 tokens. Values are Python floats or 0-d tensors; tensors stay on their device
until ``value`` or ``flatten`` asks for a number, so that accumulating them does not wait for the device.
torch is not imported.

A rank's metrics cross the ranks in two all-reduces, whatever their number::

    flat = flatten(metrics)                   # the same schema on every rank
    all_reduce(sums, op=SUM); all_reduce(maxes, op=MAX)
    metrics = unflatten(flat.schema, sums, maxes)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

# A float, or a 0-d tensor of any device.
Scalar: TypeAlias = Any


def _larger(a: Scalar, b: Scalar) -> Scalar:
    """The maximum, NaN if either is NaN; on the device where both are tensors."""
    if hasattr(a, "maximum") and hasattr(b, "maximum"):
        return a.maximum(b)
    a, b = float(a), float(b)
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


@dataclass(frozen=True)
class Mean:
    """``total / count``: add both. ``count`` is a number of things (tokens, pairs) or a sum of weights."""

    total: Scalar
    count: Scalar
    sums: ClassVar[int] = 2
    maxes: ClassVar[int] = 0

    @property
    def value(self) -> float:
        count = float(self.count)
        return float(self.total) / count if count else math.nan

    @property
    def empty(self) -> bool:
        return float(self.count) == 0

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def to_floats(self) -> tuple[list[float], list[float]]:
        return [float(self.total), float(self.count)], []

    @classmethod
    def from_floats(cls, sums: Sequence[float], maxes: Sequence[float]) -> Mean:
        return cls(sums[0], sums[1])


@dataclass(frozen=True)
class Sum:
    """A count or an amount of which every part adds up."""

    total: Scalar
    sums: ClassVar[int] = 1
    maxes: ClassVar[int] = 0
    empty: ClassVar[bool] = False

    @property
    def value(self) -> float:
        return float(self.total)

    def merge(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def to_floats(self) -> tuple[list[float], list[float]]:
        return [float(self.total)], []

    @classmethod
    def from_floats(cls, sums: Sequence[float], maxes: Sequence[float]) -> Sum:
        return cls(sums[0])


@dataclass(frozen=True)
class Max:
    """The worst rank's value: peak memory, the slowest step."""

    maximum: Scalar
    sums: ClassVar[int] = 0
    maxes: ClassVar[int] = 1

    @property
    def value(self) -> float:
        return float(self.maximum)

    @property
    def empty(self) -> bool:
        return self.value == -math.inf

    def merge(self, other: Max) -> Max:
        return Max(_larger(self.maximum, other.maximum))

    def to_floats(self) -> tuple[list[float], list[float]]:
        return [], [float(self.maximum)]

    @classmethod
    def from_floats(cls, sums: Sequence[float], maxes: Sequence[float]) -> Max:
        return cls(maxes[0])


@dataclass(frozen=True)
class Min:
    """The smallest value; crosses the ranks as the maximum of its negative."""

    minimum: Scalar
    sums: ClassVar[int] = 0
    maxes: ClassVar[int] = 1

    @property
    def value(self) -> float:
        return float(self.minimum)

    @property
    def empty(self) -> bool:
        return self.value == math.inf

    def merge(self, other: Min) -> Min:
        return Min(-_larger(-self.minimum, -other.minimum))

    def to_floats(self) -> tuple[list[float], list[float]]:
        return [], [-float(self.minimum)]

    @classmethod
    def from_floats(cls, sums: Sequence[float], maxes: Sequence[float]) -> Min:
        return cls(-maxes[0])


Metric: TypeAlias = Mean | Sum | Max | Min
_KINDS: dict[str, type[Metric]] = {kind.__name__: kind for kind in (Mean, Sum, Max, Min)}
# What a rank contributes that has no value of a key.
_NEUTRAL: dict[str, Metric] = {
    "Mean": Mean(0.0, 0.0),
    "Sum": Sum(0.0),
    "Max": Max(-math.inf),
    "Min": Min(math.inf),
}

Schema: TypeAlias = tuple[tuple[str, str], ...]


def reduce_metrics(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge the metrics of micro-batches, or of ranks; a key may be missing from some parts.

    Raises:
        ValueError: a key has different kinds in two parts.
    """
    merged: dict[str, Metric] = {}
    for part in parts:
        for key, metric in part.items():
            if key not in merged:
                merged[key] = metric
            elif type(merged[key]) is not type(metric):
                raise ValueError(
                    f"Metric '{key}' is a {type(merged[key]).__name__} in one part and a "
                    f"{type(metric).__name__} in another: give it one kind."
                )
            else:
                merged[key] = merged[key].merge(metric)
    return merged


def to_values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Plain numbers for the sinks; a metric that nothing contributed to is left out."""
    return {key: metric.value for key, metric in metrics.items() if not metric.empty}


@dataclass(frozen=True)
class Flat:
    """Metrics as two vectors: ``sums`` for an all-reduce by SUM, ``maxes`` for one by MAX."""

    schema: Schema
    sums: list[float]
    maxes: list[float]


def schema_of(metrics: Mapping[str, Metric]) -> Schema:
    """Keys and kinds in the order of the flat vectors: sorted, so equal on ranks that log the same keys."""
    return tuple((key, type(metrics[key]).__name__) for key in sorted(metrics))


def flatten(metrics: Mapping[str, Metric], schema: Schema | None = None) -> Flat:
    """``metrics`` as two lists of floats.

    Args:
        metrics: this rank's metrics.
        schema: an agreed order, where ranks may lack some of the keys; what is missing contributes nothing.

    Raises:
        ValueError: ``metrics`` has a key or kind that ``schema`` has not: the vectors would not line up.
    """
    own = schema_of(metrics)
    schema = own if schema is None else schema
    if extra := set(own) - set(schema):
        key, kind = sorted(extra)[0]
        raise ValueError(
            f"Metric '{key}' ({kind}) is not in the schema that the ranks agreed on: add it there."
        )
    sums: list[float] = []
    maxes: list[float] = []
    for key, kind in schema:
        added, compared = metrics.get(key, _NEUTRAL[kind]).to_floats()
        sums += added
        maxes += compared
    return Flat(schema, sums, maxes)


def unflatten(schema: Schema, sums: Sequence[float], maxes: Sequence[float]) -> dict[str, Metric]:
    """The inverse of ``flatten``, after the all-reduces.

    Raises:
        ValueError: the vectors are not as long as the schema says.
    """
    wanted = (sum(_KINDS[k].sums for _, k in schema), sum(_KINDS[k].maxes for _, k in schema))
    if (len(sums), len(maxes)) != wanted:
        raise ValueError(f"Expected vectors of {wanted} numbers, found {(len(sums), len(maxes))}.")
    metrics: dict[str, Metric] = {}
    s = m = 0
    for key, name in schema:
        kind = _KINDS[name]
        metrics[key] = kind.from_floats(sums[s : s + kind.sums], maxes[m : m + kind.maxes])
        s, m = s + kind.sums, m + kind.maxes
    return metrics
