"""Means are never averaged, and a rank's metrics survive the way through two flat vectors."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lab_utils.telemetry.reductions import (
    Max,
    Mean,
    Min,
    Sum,
    flatten,
    reduce_metrics,
    schema_of,
    to_values,
    unflatten,
)

NUMBER = st.floats(-1e6, 1e6)
METRIC = st.one_of(
    st.builds(Mean, NUMBER, st.floats(0.5, 1e6)),
    st.builds(Sum, NUMBER),
    st.builds(Max, NUMBER),
    st.builds(Min, NUMBER),
)


def test_a_mean_over_unequal_parts_weighs_every_token_once():
    parts = [{"loss": Mean(7 * 2.0, 7)}, {"loss": Mean(900 * 4.0, 900)}]
    assert reduce_metrics(parts)["loss"].value == pytest.approx((14 + 3600) / 907)


def test_each_kind_has_its_rule():
    parts = [{"n": Sum(2), "peak": Max(3), "least": Min(-1)}, {"n": Sum(5), "peak": Max(1), "least": Min(4)}]
    assert to_values(reduce_metrics(parts)) == {"n": 7, "peak": 3, "least": -1}


def test_a_key_may_be_missing_from_a_part_but_not_change_its_kind():
    assert to_values(reduce_metrics([{"a": Sum(1)}, {"b": Max(2)}])) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="'a' is a Sum in one part and a Max"):
        reduce_metrics([{"a": Sum(1)}, {"a": Max(1)}])


def test_tensors_stay_tensors_until_a_number_is_asked_for():
    one = {
        "loss": Mean(torch.tensor(3.0), torch.tensor(2.0)),
        "peak": Max(torch.tensor(1.0)),
        "low": Min(torch.tensor(4.0)),
    }
    merged = reduce_metrics(
        [one, {"loss": Mean(torch.tensor(1.0), 2), "peak": Max(torch.tensor(5.0)), "low": Min(9.0)}]
    )
    assert isinstance(merged["loss"].total, torch.Tensor) and isinstance(merged["peak"].maximum, torch.Tensor)
    assert to_values(merged) == {"loss": 1.0, "peak": 5.0, "low": 4.0}


def test_nan_is_not_lost_in_a_maximum():
    assert math.isnan(Max(math.nan).merge(Max(1.0)).value) and math.isnan(Max(1.0).merge(Max(math.nan)).value)


def test_what_nobody_contributed_to_is_left_out():
    assert to_values({"a": Mean(0, 0), "b": Max(-math.inf), "c": Min(math.inf), "d": Sum(0)}) == {"d": 0}


@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), METRIC), min_size=1, max_size=4))
def test_an_all_reduce_of_the_flat_vectors_gives_what_merging_gives(ranks):
    kinds = {}
    ranks = [{k: m for k, m in r.items() if kinds.setdefault(k, type(m)) is type(m)} for r in ranks]
    expected = reduce_metrics(ranks)
    schema = schema_of(expected)
    flats = [flatten(rank, schema) for rank in ranks]
    sums = [sum(column) for column in zip(*(f.sums for f in flats))]
    maxes = [max(column) for column in zip(*(f.maxes for f in flats))]
    found = unflatten(schema, sums, maxes)
    assert set(found) == set(expected)
    for key in expected:
        assert found[key].value == pytest.approx(expected[key].value, rel=1e-9, abs=1e-6)


def test_vectors_that_would_not_line_up_are_refused():
    schema = schema_of({"a": Sum(1)})
    with pytest.raises(ValueError, match="'b'"):
        flatten({"b": Sum(1)}, schema)
    with pytest.raises(ValueError, match="vectors of"):
        unflatten(schema, [1.0, 2.0], [])


def test_the_types_import_no_torch():
    code = (
        "import lab_utils.telemetry.reductions, lab_utils.telemetry.sinks, sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
