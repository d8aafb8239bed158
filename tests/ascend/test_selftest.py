"""`lab ascend selftest`: what fails a part, and that one part's end leaves the others and the report."""

import json

import pytest

from lab_utils.ascend import report as reports
from lab_utils.ascend import selftest
from lab_utils.errors import LayoutError, RunError


@pytest.fixture
def workers(monkeypatch):
    """Stands for the workers: answers by name; no process is started."""
    answers: dict[str, object] = {}

    def worker(name, ranks, options, folder, seconds):
        found = answers[name]
        found = found(options) if callable(found) else found
        return (None, found) if isinstance(found, str) else (found, "")

    monkeypatch.setattr(selftest, "_worker", worker)
    return answers


def burnt(**changes):
    chips = {"chip/temp_max": 60.0, "chip/util_mean": 90.0, **changes.pop("chips", {})}
    row = {
        "steps": 99,
        "first": 5.0,
        "last": 4.0,
        "finite": True,
        "seconds": 6.0,
        "tokens_per_s": 10.0,
        "chips": chips,
    }
    return row | changes


def test_a_device_that_is_not_here_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(LayoutError, match="this machine has no npu device"):
        selftest.run("npu", out=tmp_path / "r.md")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what, by", [("losses", 1e-3), ("norms", 1e-2), ("weights", 1e-2)])
def test_two_steps_that_part_from_the_cpus_fail(workers, tmp_path, what, by):
    same = {"losses": [4.0, 3.0], "norms": [1.0, 2.0], "weights": {"a": 1.0, "b": 100.0}}
    other = json.loads(json.dumps(same))
    values = other[what]
    key = "b" if what == "weights" else 1
    values[key] *= 1 + by
    workers["two_steps"] = lambda options: other if options["device"] == "npu" else same
    ok, said, _ = selftest.two_steps("npu", tmp_path)
    assert not ok and f"{what} differ by {by:.1e}" in said


@pytest.mark.parametrize("found", [[1.0, float("nan")], {"a": float("inf")}])
def test_numbers_that_are_not_finite_differ_without_end(found):
    expected = dict.fromkeys(found, 1.0) if isinstance(found, dict) else [1.0, 1.0]
    assert selftest._largest(found, expected) == float("inf")
    assert selftest._largest({"a": 1.0}, {"b": 1.0}) == float("inf")


@pytest.mark.parametrize(
    "row, said",
    [
        (burnt(last=5.5), "the loss did not fall: 5.000 to 5.500"),
        (burnt(finite=False), "not finite"),
        (burnt(chips={"chip/temp_max": 96.0}), "a chip reached 96 °C"),
        (burnt(chips={"chip/unhealthy": 2.0}), "2 chips said they are not well"),
    ],
)
def test_a_burn_in_fails_by_loss_heat_or_health(workers, tmp_path, row, said):
    workers["burn_in"] = row
    ok, found, _ = selftest.burn_in("npu", 16, 1.0, tmp_path)
    assert not ok and said in found
    workers["burn_in"] = burnt()
    ok, found, _ = selftest.burn_in("npu", 16, 1.0, tmp_path)
    assert ok and "60 °C" in found and "90 % used" in found


def test_a_sweep_with_wrong_values_fails(workers, tmp_path):
    row = {"collective": "all_reduce", "bytes": 4096, "ms": 1.0, "gb_s": 2.0, "right": True}
    workers["sweep"] = [row, {**row, "collective": "all_to_all", "right": False}]
    ok, said, _ = selftest.collectives("npu", 16, tmp_path)
    assert not ok and said == "wrong values: all_to_all of 4,096 bytes"
    assert selftest.collectives("npu", 1, tmp_path)[:2] == (True, "left out: one device")


def test_a_part_that_dies_is_a_finding_and_the_report_tells_of_the_others(workers, tmp_path, monkeypatch):
    row = {"operator": "rope", "implementation": "npu", "dtype": "bfloat16", "ok": True}
    rows = [row | {"forward_error": 1e-3, "gradient_error": None}]
    monkeypatch.setattr(selftest, "operators", lambda device, folder: (True, "one", rows))
    workers |= {"two_steps": "ended with code -11: no message", "sweep": [], "burn_in": burnt()}
    told = []
    found = selftest.run("cpu", minutes=1, out=tmp_path / "below" / "r.md", say=told.append)
    assert not found.ok and [part.ok for part in found.parts] == [True, False, True, True]
    page = (tmp_path / "below" / "r.md").read_text()
    assert "FAILED" in page and "code -11" in page and "| rope/npu | bfloat16 | 1.0e-03 |  | yes |" in page
    assert json.loads((tmp_path / "below" / "r.json").read_text())["parts"][1]["found"].startswith(
        "on cpu: ended"
    )
    assert any("two steps: FAILED" in line for line in told)


def test_a_worker_that_hangs_is_ended_with_its_children():
    done = selftest._ended(["bash", "-c", "sleep 60 & sleep 60"], 0.5)
    assert done.returncode == -9 and "no answer in 0 s" in selftest._end_of(done)


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    report = reports.Report({"host": "n1"}, path=tmp_path / "file" / "r.md")
    with pytest.raises(RunError, match="give another by --out"):
        reports.write(report)
