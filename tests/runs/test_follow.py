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
from lab_utils.runs.follow import Follower
from lab_utils.runs.series import Buckets, Series
from lab_utils.telemetry import chip_log, jsonl

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
@settings(max_examples=40, deadline=None)
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


# -- chips, logs, samples ----------------------------------------------------------------------------------------------


def chips(*used, **more):
    return [{"index": i, "util": u, **more} for i, u in enumerate(used)]


def follow(tmp_path) -> Follower:
    follower = Follower(tmp_path)
    follower.catch_up()
    return follower


def again(follower: Follower):
    """Another poll, chips and logs included."""
    follower._chips_at = follower.chips._listed = follower.logs._listed = -1e9
    return follower.catch_up()


def test_of_chips_the_newest_reading_and_a_short_history_are_kept(tmp_path):
    path = chip_log.node_file(tmp_path, 4)
    add(path, *({"time": 100.0 + 2 * i, "chips": chips(i % 100, 50.0)} for i in range(2000)))
    follower = follow(tmp_path)
    node = follower.chips.nodes[4]
    assert node.time == 100.0 + 2 * 1999 and node.chips[0]["util"] == 99 and node.interval == 2.0
    assert 5 < len(node.history) <= 60 and node.history[-1] == (node.time, 74.5, 50.0)
    add(path, {"time": 5000.0, "chips": chips(7.0)})
    assert again(follower).chips == {4} and node.chips == chips(7.0)
    assert not again(follower), "nothing new"


def test_nodes_that_begin_later_are_found_and_damaged_rows_are_passed_over(tmp_path):
    follower = follow(tmp_path)
    assert follower.chips.nodes == {}
    add(
        chip_log.node_file(tmp_path, 0),
        {"time": "x", "chips": []},
        {"time": 1.0, "chips": None},
        {"chips": []},
    )
    add(chip_log.node_file(tmp_path, 12), {"time": 1.0, "chips": [*chips(1.0), "?"]})
    again(follower)
    assert follower.chips.nodes[12].chips == chips(1.0) and follower.chips.nodes[0].chips == []


def test_the_worst_node_is_sick_then_silent_then_idle(tmp_path):
    now = 10_000.0
    for number, row in {
        0: {"time": now, "chips": chips(80.0, 90.0)},
        1: {"time": now, "chips": chips(99.0, 3.0)},
        2: {"time": now - 500, "chips": chips(70.0)},
        3: {"time": now, "chips": chips(70.0, health="Critical")},
        4: {"time": now, "chips": [{"index": 0}]},
    }.items():
        add(chip_log.node_file(tmp_path, number), row)
    follower = follow(tmp_path)
    assert [node.number for node in follower.chips.worst_first(now)] == [3, 2, 1, 0, 4]


def test_a_log_is_followed_from_its_end_and_a_progress_bar_is_its_last_word(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "launcher.log").write_text("started\n")
    follower = follow(tmp_path)
    assert follower.logs.shown == "launcher.log" and follower.logs.lines == ["started"]
    (logs / "rank-0.log").write_text("".join(f"line {i}\n" for i in range(5000)) + " 1%|\r 2%|\r 3%|\n")
    assert again(follower).log
    assert follower.logs.shown == "rank-0.log" and follower.logs.lines[-1] == " 3%|"
    assert len(follower.logs.lines) == 80 and not again(follower).log


def test_like_errors_are_one_and_those_of_an_earlier_attempt_are_history(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    for rank in range(100):
        (logs / f"rank-{rank}.log").write_text(
            f"--- rank {rank}, process 7, now\nValueError: no, rank {rank}\nFATAL E{rank % 2}\n"
        )
    follower = follow(tmp_path)
    for _ in range(4):  # a few dozen files at a time
        again(follower)
    errors = {error.text: error for error in follower.logs.errors.values()}
    assert len(errors) == 3 and {"FATAL E0", "FATAL E1"} < set(errors)
    (like,) = (error for text, error in errors.items() if text.startswith("ValueError: no, rank "))
    assert like.count == len(like.files) == 100
    for rank in range(0, 100, 2):
        with (logs / f"rank-{rank}.log").open("a") as stream:
            stream.write(f"--- rank {rank}, process 8, later\nfine\n")
    for _ in range(4):
        again(follower)
    left = follower.logs.errors.values()
    assert len(left) == 2 and like in left and len(like.files) == 50


@pytest.mark.parametrize(
    ("line", "is_error"),
    [
        ("torch.OutOfMemoryError: NPU out of memory", True),
        ("2026-11-25 10:00:00 ERROR hccl: timeout", True),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED", True),
        ("error: batch does not divide.", True),
        ("ValueError", True),
        ("step 3: loss 0.1, 0 errors, no exceptions", False),
        ("[W CUDAErrorHandling] all fine", False),
        ("  error_file: <N/A>", False),
        ("ErrorRate 0.1", False),
    ],
)
def test_what_looks_like_an_error(tmp_path, line, is_error):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-3.log").write_text(line + "\n")
    assert [error.text for error in follow(tmp_path).logs.errors.values()] == [line.strip()] * is_error


def test_samples_and_events_are_the_newest_and_a_replaced_file_starts_anew(tmp_path):
    add(tmp_path / "samples.jsonl", *({"step": i, "completion": "x" * 5000} for i in range(300)))
    add(tmp_path / "events.jsonl", {"kind": "checkpoint"})
    follower = follow(tmp_path)
    assert [row["step"] for row in follower.samples] == list(range(288, 300))
    assert list(follower.events) == [{"kind": "checkpoint"}]
    add(tmp_path / "new", {"step": 1})
    (tmp_path / "new").replace(tmp_path / "samples.jsonl")
    assert again(follower).samples and list(follower.samples) == [{"step": 1}]


def test_a_poll_ends_when_its_time_is_up_and_the_next_goes_on(tmp_path):
    rows = (json.dumps({"step": s, "a": s, "b": "x" * 200}) + "\n" for s in range(1, 6001))
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    follower, polls = Follower(tmp_path), 1
    changes = follower.poll(0.0)
    assert changes.behind and 0 < follower.series.newest < 6000
    while changes.behind:
        changes, polls = follower.poll(0.0) + changes, polls + 1
    assert follower.series.newest == 6000 and polls > 5 and changes.bucket == 0


def test_status_time_left_and_changes(tmp_path):
    follower = follow(tmp_path)
    assert not follower.poll() and follower.seconds_left() is None
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "step": 3, "total_steps": 10}))
    add(tmp_path / "metrics.jsonl", *({"step": s, "time": 5.0 * s, "a": 1} for s in (1, 2, 3)))
    changes = follower.poll()
    assert changes.status and changes.bucket == 1 and follower.seconds_left() == 35.0
    (tmp_path / "status.json").write_text("{half")
    assert not follower.poll().status and follower.status["state"] == "running"
