"""Steps of several layouts in one job, one of each in turn."""

import pytest

from lab_utils.bench.layouts import seconds_of

pytestmark = pytest.mark.slow  # real ranks


def test_engines_of_two_layouts_take_turns_in_one_job():
    size = {"source": "preset:tiny", "row_tokens": 64}
    runs = [
        {**size, "rows": 2, "layout": "dp2_ep1_pp1"},
        {**size, "rows": 4, "layout": "dp1_ep1_pp2"},
        {**size, "rows": 8, "layout": "dp2_ep2_pp1"},
    ]
    found = seconds_of(2, runs, steps=2)
    assert len(found) == 3 and min(found) > 0
