"""Energy is the integral of power over the time that has samples, whatever nodes, gaps and attempts there were."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.telemetry import chip_log, jsonl
from lab_utils.telemetry.chip_log import (
    JOULES_PER_KWH,
    Meter,
    energy,
    newest,
    newest_row,
    node_file,
    node_files,
)


def write(run, node, samples, *, first=(0,), chips=2, total=True):
    """Rows of (time, watts); ``first`` marks where attempts begin, by place."""
    path = node_file(run, node)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        for place, (time, watts) in enumerate(samples):
            row = {"time": time} | ({"first": True} if place in first else {})
            dies = [{"index": i, "util": 50.0} for i in range(chips)]
            if watts is not None:
                row |= {"chip/power_total": watts} if total else {}
                dies[0]["power"] = watts
            stream.write(json.dumps({**row, "chip/util_mean": 50.0, "chips": dies}) + "\n")


def every(seconds, start, end, watts):
    times = [start + i * seconds for i in range(int((end - start) / seconds) + 1)]
    return [(t, watts(t) if callable(watts) else watts) for t in times]


def test_constant_power_is_power_times_time(tmp_path):
    write(tmp_path, 0, every(2.0, 100.0, 3700.0, 1000.0))
    used = energy(tmp_path)
    assert used.kwh == pytest.approx(1.0) and used.watts_mean == pytest.approx(1000.0)
    assert used.seconds == pytest.approx(3600.0) and used.covered == pytest.approx(1.0) and used.chips == 2
    assert used.joules_per_token(3_600_000) == pytest.approx(1.0) and used.joules_per_token(0) is None


def test_a_ramp_is_integrated_exactly(tmp_path):
    write(tmp_path, 0, every(3.0, 0.0, 300.0, lambda t: 5.0 * t))
    assert energy(tmp_path).kwh * JOULES_PER_KWH == pytest.approx(5.0 * 300.0**2 / 2)


def test_nodes_add_up_though_they_sample_at_other_times(tmp_path):
    write(tmp_path, 0, every(2.0, 0.0, 100.0, 300.0))
    write(tmp_path, 3, every(5.0, 0.5, 100.5, 500.0), chips=4)
    used = energy(tmp_path)
    assert used.kwh * JOULES_PER_KWH == pytest.approx(300 * 100 + 500 * 100)
    assert used.chips == 6 and used.seconds == pytest.approx(100.5)
    assert [chip_log.node_of(path) for path in node_files(tmp_path)] == [0, 3]


def test_the_time_between_two_attempts_belongs_to_neither(tmp_path):
    write(tmp_path, 0, [*every(2.0, 0.0, 100.0, 300.0), *every(2.0, 5000.0, 5100.0, 300.0)], first=(0, 51))
    write(tmp_path, 1, every(2.0, 1.0, 99.0, 100.0))  # the second attempt had one node less
    used = energy(tmp_path)
    assert used.kwh * JOULES_PER_KWH == pytest.approx(300 * 200 + 100 * 98)
    assert used.covered == pytest.approx(298 / 300)


def test_a_probe_that_died_leaves_the_rest_of_the_run_uncovered(tmp_path):
    write(tmp_path, 0, every(2.0, 0.0, 100.0, 300.0))
    for step in range(41):
        jsonl.append(tmp_path / "metrics.jsonl", {"step": step, "time": 10.0 * step})
    used = energy(tmp_path)
    assert used.covered == pytest.approx(0.25) and used.watts_mean == pytest.approx(300.0)


def test_no_known_power_is_no_energy_and_never_nothing(tmp_path):
    assert energy(tmp_path) == chip_log.Energy(None, 0.0, 0, None, 0.0)
    write(tmp_path, 0, every(2.0, 0.0, 100.0, None))
    assert energy(tmp_path) == chip_log.Energy(None, 0.0, 2, None, 0.0)
    assert energy(tmp_path).joules_per_token(10) is None


def test_rows_that_name_no_total_are_summed_over_their_chips(tmp_path):
    write(tmp_path, 0, every(2.0, 0.0, 100.0, 300.0), total=False)
    assert energy(tmp_path).kwh * JOULES_PER_KWH == pytest.approx(300 * 100)


def test_a_sample_without_power_is_bridged_and_a_torn_line_is_passed_over(tmp_path):
    samples = every(2.0, 0.0, 100.0, 300.0)
    samples[10] = (samples[10][0], None)
    write(tmp_path, 0, samples)
    with node_file(tmp_path, 0).open("a") as stream:
        stream.write('{"time": 102.0, "chip/po')
    assert energy(tmp_path).kwh * JOULES_PER_KWH == pytest.approx(300 * 100)


@settings(deadline=None, max_examples=60)
@given(
    gaps=st.lists(st.sampled_from([1.0, 1.0, 1.0, 2.5, 4.0, 7.0, 60.0, 4000.0]), min_size=5, max_size=60),
    watts=st.floats(1.0, 1e6),
    start=st.integers(0, 10**9),
)
def test_what_lies_in_long_gaps_is_never_counted(tmp_path_factory, gaps, watts, start):
    gaps = [1.0] * (len(gaps) + 1) + gaps  # the usual interval is 1 s: 5 s are bridged
    run = tmp_path_factory.mktemp("run")
    times = [float(start)]
    for gap in gaps:
        times.append(times[-1] + gap)
    write(run, 0, [(t, watts) for t in times])
    used = energy(run)
    bridged = sum(gap for gap in gaps if gap <= 5.0)
    assert used.kwh * JOULES_PER_KWH == pytest.approx(bridged * watts)
    assert used.seconds == pytest.approx(bridged) and used.watts_mean == pytest.approx(watts)
    assert used.covered == pytest.approx(bridged / sum(gaps))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0.1, 30.0), st.floats(0.0, 1e5)), min_size=2, max_size=40))
def test_the_meter_of_a_live_run_is_the_trapezoid_rule(steps):
    meter, now, expected, before = Meter(spent=7.0), 0.0, 7.0, None
    for gap, watts in steps:
        now += gap
        if before is not None and gap <= 10.0:
            expected += gap * (watts + before) / 2
        before = watts
        joules = meter.add(now, watts, limit=10.0 + 1e-6)
    assert joules == pytest.approx(expected)


def test_a_clock_that_steps_back_adds_nothing():
    meter = Meter()
    assert meter.add(100.0, None, 10.0) is None
    assert [meter.add(t, 50.0, 10.0) for t in (100.0, 102.0, 90.0, 91.0)] == [0.0, 100.0, 100.0, 150.0]


def test_the_newest_row_is_read_from_the_end_of_a_long_file(tmp_path):
    write(tmp_path, 0, every(1.0, 0.0, 2000.0, 300.0), chips=64)
    assert newest_row(node_file(tmp_path, 0))["time"] == 2000.0
    # A row longer than the first look, then half a row.
    wide = {"time": 2001.0, "chips": [{"index": i, "name": "x" * 100} for i in range(500)]}
    with node_file(tmp_path, 0).open("a") as stream:
        stream.write(json.dumps(wide) + '\n{"time": 2002.0, "ch')
    assert newest(tmp_path)[0]["time"] == 2001.0
    assert newest_row(tmp_path / "none.jsonl") is None and newest(tmp_path / "elsewhere") == {}
