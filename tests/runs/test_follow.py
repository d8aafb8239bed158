"""A run that is followed is the run that is read: random histories, torn lines, replaced files, resumed attempts."""

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.recipe import Recipe
from lab_utils.runs._appended import Appended
from lab_utils.runs.api import Run
from lab_utils.runs.directory import create
from lab_utils.runs.series import Buckets, Series
from lab_utils.telemetry import jsonl

RECIPE = Recipe.parse({"data": {"train": [{"manifest": "ascent-tasks-sft"}]}})


def add(path, *rows):
    for row in rows:
        jsonl.append(path, row)


# -- files that grow ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.binary(max_size=9).filter(lambda line: b"\n" not in line), max_size=12),
    st.lists(st.integers(1, 20), max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_whole_lines_come_once_however_the_file_grows(tmp_path_factory, lines, cuts):
    path = tmp_path_factory.mktemp("grows") / "a"
    data, found, file = b"\n".join([*lines, b"torn"]), [], Appended(path)
    for cut in [*cuts, len(data)]:
        with path.open("ab") as stream:
            stream.write(data[:cut])
        data = data[cut:]
        part = file.read(most=7)
        found += part.lines
        while part.behind:
            part = file.read(most=7)
            found += part.lines
    content = path.read_bytes()
    assert [line for _, line in found] == lines
    assert all(content[offset:].startswith(line + b"\n") for offset, line in found)


def test_a_file_that_is_not_there_or_does_not_grow_has_nothing_new(tmp_path):
    file = Appended(tmp_path / "a", lazily=True)
    assert file.read().lines == []
    (tmp_path / "a").write_text("1\n2")
    assert [line for _, line in file.read().lines] == [b"1"]
    assert file.read().lines == [] and file.offset == 2


@pytest.mark.parametrize("how", ["replaced", "cut", "written anew"])
def test_another_file_of_the_same_name_is_read_from_its_start(tmp_path, how):
    path = tmp_path / "a"
    path.write_text("one\ntwo\n")
    file = Appended(path)
    file.read()
    if how == "replaced":
        (tmp_path / "b").write_text("one\ntwo\nthree\n")
        (tmp_path / "b").replace(path)
    else:
        path.write_text("one\n" if how == "cut" else "uno\ndue\ntre\n")
    part = file.read()
    assert part.afresh and part.lines[0] == (0, path.read_bytes().split(b"\n")[0])


def test_only_the_end_of_a_long_file_is_read_where_only_that_matters(tmp_path):
    path = tmp_path / "a"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    lines = [line for _, line in Appended(path, newest=100).read().lines]
    assert lines[-1] == b"line 999" and 5 < len(lines) < 12 and all(len(line) == 8 for line in lines)


# -- metrics -----------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.floats(-1e6, 1e6, allow_subnormal=False),
    st.integers(-9, 9),
    st.sampled_from(["nan", "inf", "-inf", None, "text"]),
)
ROWS = st.fixed_dictionaries(
    {"step": st.integers(0, 40) | st.sampled_from([41, 90, 300, "x", None])},
    optional={"a": NUMBERS, "b": NUMBERS, "train/global_step": st.just(1.0), "time": st.just(1.0)},
)


@st.composite
def histories(draw):
    """Lines of a run: stretches of steps upwards, now and then a step again or an earlier one, and rubbish."""
    rows, step = [], 0
    for _ in range(draw(st.integers(0, 25))):
        kind = draw(st.sampled_from(["next", "next", "next", "next", "same", "back", "any"]))
        row = draw(ROWS)
        if kind != "any":
            moves = {"next": st.integers(1, 3), "same": st.just(0), "back": st.integers(-12, -1)}
            step = row["step"] = max(step + draw(moves[kind]), 0)
        elif isinstance(row["step"], int):
            step = row["step"]
        rows.append(row)
    return rows


def check(series: Series, run: Run) -> None:
    """Every bucket has the mean, smallest and largest of the steps that ``Run.metrics()`` has of it."""
    frame = run.metrics()
    width, keys = series.buckets.width, [c for c in frame.columns if c != "time"]
    table = series.buckets.table(0, series.buckets.size, ["step", *keys])
    for column, key in enumerate(["step", *keys]):
        values = frame.index.to_series().astype(float) if key == "step" else frame[key]
        values = values[np.isfinite(values.to_numpy(dtype=float))]
        grouped = values.groupby(values.index // width).agg(["mean", "min", "max"])
        there = ~np.isnan(table[:, column, 0])
        assert list(np.flatnonzero(there)) == list(grouped.index), key
        np.testing.assert_allclose(table[there, column], grouped.to_numpy(), rtol=1e-5, atol=1e-3)
    assert series.newest == (frame.index[-1] if len(frame) else -1)


@given(histories(), st.lists(st.integers(1, 200), max_size=30), st.sampled_from([4, 8, 16, 576]))
@settings(max_examples=300, deadline=None)
def test_followed_metrics_are_those_of_the_run_whatever_its_history(tmp_path_factory, rows, cuts, capacity):
    run = create(RECIPE, tmp_path_factory.mktemp("history"))
    path, series = run.path / "metrics.jsonl", Series(run.path / "metrics.jsonl", capacity)
    data = b"".join(jsonl.encode(row).encode() + (b'{"torn\n' if len(row) == 2 else b"") for row in rows)
    for cut in [*cuts, len(data)]:
        with path.open("ab") as stream:
            stream.write(data[:cut])
        data = data[cut:]
        series.poll()
        if path.read_bytes().endswith(b"\n"):  # Run.metrics() takes a whole last line without its line break
            check(series, Run(run))
        assert series.buckets.size <= capacity


def test_ten_thousand_steps_are_few_points_and_the_newest_are_told(tmp_path):
    path, series = tmp_path / "metrics.jsonl", Series(tmp_path / "metrics.jsonl")
    path.write_text(
        "".join(json.dumps({"step": s, "time": 2.0 * s, "a": s}) + "\n" for s in range(1, 10_001))
    )
    while series.poll(until=time.monotonic()):
        pass
    assert series.changed() == 0 and series.changed() is None
    assert 288 <= series.buckets.size <= 576 and series.seconds_a_step() == 2.0
    add(path, {"step": 10_001, "a": 7.0})
    series.poll()
    assert series.changed() == series.buckets.size - 1 and series.latest() == {"a": 7.0}


def test_a_metric_logged_only_by_an_abandoned_attempt_after_its_last_value_keeps_the_one_before(tmp_path):
    series = Series(tmp_path / "m")
    add(
        tmp_path / "m",
        {"step": 2, "eval/loss": 5.0, "a": 1},
        {"step": 4, "eval/loss": 3.0},
        {"step": 3, "a": 2},
    )
    series.poll()
    assert series.latest() == {"eval/loss": 5.0, "a": 2.0}


def test_a_run_that_begins_again_at_its_start_has_every_step_as_a_point_again(tmp_path):
    series = Series(tmp_path / "m", capacity=8)
    add(tmp_path / "m", *({"step": s, "a": s} for s in range(1, 100)), {"step": 1, "a": 1})
    series.poll()
    assert series.buckets.width == 1 and series.buckets.size == 2


def test_infinite_and_missing_numbers_leave_a_gap():
    buckets = Buckets(4)
    buckets.add(1, {"a": math.nan, "b": 2.0})
    buckets.add(2, {"a": math.inf})
    assert np.isnan(buckets.table(0, 3, ["a"])).all() and not buckets.has("a") and buckets.has("b")
    assert not buckets.has("c") and np.isnan(buckets.table(0, 3, ["c"])).all()
