"""Alerts on replayed series: each fault is told once per episode, and a healthy run tells nothing."""

import math
import random
import time

import pytest

from lab_utils.telemetry.alerts import HOT, Alerts, Limits


class Replay:
    """Alerts under a clock that the test turns."""

    def __init__(self, **limits):
        self.now, self.told = 0.0, []
        self.alerts = Alerts(
            lambda kind, text: self.told.append((kind, text)), Limits(**limits), lambda: self.now
        )

    def line(self, step, seconds=2.0, **values):
        self.now += seconds
        self.alerts.look()
        self.alerts.step(
            step, {"train/loss": 1.0, "train/grad_norm": 1.0, "perf/step_time": seconds, **values}
        )

    def wait(self, seconds, every=5.0):
        end = self.now + seconds
        while self.now < end:
            self.now += every
            self.alerts.look()

    def sample(self, seconds=10.0, nodes=2, **chips):
        """``chips``: n<node>c<index>={...} over a healthy default."""
        self.now += seconds
        rows = {
            node: {
                "time": self.now,
                "chips": [
                    {"index": i, "util": 80.0, "temp": 50.0, "health": "OK", **chips.get(f"n{node}c{i}", {})}
                    for i in range(4)
                ],
            }
            for node in range(nodes)
        }
        self.alerts.chips(rows)

    @property
    def kinds(self):
        return [kind for kind, _ in self.told]


def test_a_healthy_run_tells_nothing():
    replay, draw = Replay(hot=90.0), random.Random(0)
    for step in range(1, 2000):
        replay.line(step, draw.uniform(1.0, 4.0))
        if step % 200 == 0:
            replay.wait(400)  # an evaluation
        if step % 5 == 0:
            replay.sample(n0c1={"util": draw.choice([0.0, 90.0])}, n1c2={"temp": draw.uniform(40, 85)})
    assert replay.told == []


def test_a_loss_that_is_not_finite_is_told_once_an_episode():
    replay = Replay()
    for step in range(1, 6):
        replay.line(step)
    for step in range(6, 12):
        replay.line(step, **{"train/loss": math.nan})
    assert replay.kinds == ["alert_nan"] and "Step 6" in replay.told[0][1]
    for step in range(12, 40):
        replay.line(step)
    replay.line(40, **{"train/grad_norm": math.inf})
    assert replay.kinds == ["alert_nan"] * 2 and "train/grad_norm" in replay.told[1][1]


def test_a_skipped_step_is_told_though_its_numbers_were_dropped():
    replay = Replay()
    for step, skipped in enumerate([3, 3, 3, 4, 5, 5, 5], start=10):  # a resumed run has skipped before
        replay.line(step, **{"train/skipped_steps": float(skipped)})
    assert replay.kinds == ["alert_nan"] and "Step 13: 1 steps dropped" in replay.told[0][1]


def test_a_first_step_that_is_not_finite_is_told():
    replay = Replay()
    replay.line(1, **{"train/loss": math.nan})
    assert replay.kinds == ["alert_nan"]


def test_silence_is_told_once_and_again_after_a_step():
    replay = Replay()
    for step in range(1, 20):
        replay.line(step, 2.0)
    replay.wait(590)
    assert replay.told == []
    replay.wait(3600)
    assert replay.kinds == ["alert_stall"] and "since step 19 for 10 min" in replay.told[0][1]
    replay.line(20)
    replay.wait(700)
    assert replay.kinds == ["alert_stall"] * 2


def test_long_steps_are_no_silence():
    replay = Replay()
    for step in range(1, 10):
        replay.line(step, 400.0)  # rounds of long answers
    replay.wait(3900)
    assert replay.told == []
    replay.wait(200)
    assert replay.kinds == ["alert_stall"]


def test_a_run_that_never_steps_is_told():
    replay = Replay()
    replay.wait(1790)
    assert replay.told == []
    replay.wait(600)
    assert replay.kinds == ["alert_stall"] and "since the start" in replay.told[0][1]


def test_evaluations_between_the_lines_do_not_spoil_the_rhythm():
    replay = Replay(stall_seconds=1.0)
    for step in range(1, 30):
        replay.line(step, 2.0)
        replay.alerts.step(step, {"eval/loss": 1.0})
    replay.wait(19)
    assert replay.told == []
    replay.wait(5)
    assert replay.kinds == ["alert_stall"]


def test_an_idle_chip_among_busy_ones_is_named_once():
    replay = Replay()
    for step in range(1, 5):
        replay.line(step)
    for _ in range(60):
        replay.line(step := step + 1)
        replay.sample(n1c2={"util": 0.0}, n1c3={"util": 1.0})
    assert replay.kinds == ["alert_idle"]
    assert "2 of 8 chips" in replay.told[0][1] and "node 1: 2, 3" in replay.told[0][1]
    replay.sample()  # busy again
    for _ in range(60):
        replay.line(step := step + 1)
        replay.sample(n0c0={"util": 0.0})
    assert replay.kinds == ["alert_idle"] * 2


def test_before_the_first_step_and_in_a_stall_chips_may_idle():
    idle = {f"n{n}c{i}": {"util": 0.0} for n in range(2) for i in range(4)}
    replay = Replay()
    for _ in range(100):
        replay.sample(**idle)
    assert replay.told == []
    for step in range(1, 10):
        replay.line(step)
    replay.wait(900)
    for _ in range(100):
        replay.sample(**idle)
    assert replay.kinds == ["alert_stall"]


def test_a_chip_in_bad_health_is_told_once_and_the_next_one_too():
    replay = Replay()
    for _ in range(10):
        replay.sample(n0c3={"health": "Alarm"})
    for _ in range(10):
        replay.sample(n0c3={"health": "Alarm"}, n1c0={"health": "Critical"})
    assert replay.kinds == ["alert_unhealthy"] * 2
    assert "Alarm: node 0: 3" in replay.told[0][1] and "Critical: node 1: 0" in replay.told[1][1]
    replay.sample(nodes=1)  # node 1 is silent for a moment: no new episode when it is back
    replay.sample(n1c0={"health": "Critical"})
    assert len(replay.told) == 2


def test_heat_is_told_until_it_has_cooled():
    replay = Replay(hot=HOT["npu"])
    for temp in (85.0, 91.0, 89.0, 92.0, 86.0, 84.0, 90.0):
        replay.sample(n1c1={"temp": temp})
    assert replay.kinds == ["alert_hot"] * 2 and "up to 91: node 1: 1" in replay.told[0][1]
    cold = Replay()  # a processor may be hot
    cold.sample(n0c0={"temp": 99.0})
    assert cold.told == []


def test_many_chips_are_counted_and_few_are_named():
    replay = Replay(hot=90.0)
    replay.alerts.chips({7: {"time": 1.0, "chips": [{"index": i, "temp": 95.0} for i in range(20)]}})
    assert "20 chips" in replay.told[0][1] and replay.told[0][1].endswith("6, 7 and 12 more.")


def test_silence_is_noticed_by_a_thread_of_its_own_and_nothing_is_told_after_the_end():
    told = []
    alerts = Alerts(lambda kind, text: told.append(kind), Limits(first_seconds=0.05), every=0.01).start()
    end = time.monotonic() + 5
    while not told and time.monotonic() < end:
        time.sleep(0.01)
    assert told == ["alert_stall"]
    alerts.stop()
    alerts.chips({0: {"time": 1.0, "chips": [{"index": 0, "health": "Alarm"}]}})
    assert told == ["alert_stall"]


@pytest.mark.parametrize("field", ["util", "temp", "health"])
def test_a_chip_that_says_nothing_is_no_fault(field):
    replay = Replay(hot=90.0)
    for step in range(1, 80):
        replay.line(step)
        replay.sample(n0c0={field: None})
    assert replay.told == []
