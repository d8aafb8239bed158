"""metrics.jsonl survives a killed writer; a failing sink is dropped and the run goes on; nothing floods."""

import io
import json
import math
import sys
import types

import pytest

from lab_utils.recipe import Recipe
from lab_utils.telemetry import jsonl
from lab_utils.telemetry.console import ConsoleSink, Progress, in_notebook
from lab_utils.telemetry.jsonl import JsonlSink, Tail
from lab_utils.telemetry.sinks import MultiSink, make_sinks


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load("sft_tiny").with_changes({"schedule.steps": 100, "tracking.wandb": "disabled"})


def test_every_logged_step_is_a_line_of_strict_json(tmp_path, recipe):
    sink = JsonlSink()
    sink.open(tmp_path, recipe, {})
    sink.log(1, {"train/loss": 2.5})
    sink.log(2, {"train/loss": math.nan, "train/grad_norm": math.inf})
    sink.close("succeeded")

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["train/loss"] == 2.5
    assert math.isnan(float(rows[1]["train/loss"])) and math.isinf(float(rows[1]["train/grad_norm"]))


def test_a_line_is_on_disk_before_the_next_step(tmp_path, recipe):
    sink = JsonlSink()
    sink.open(tmp_path, recipe, {})
    sink.log(1, {"train/loss": 2.5})
    assert [row["step"] for row in jsonl.read(tmp_path / "metrics.jsonl")] == [1]


def test_a_torn_last_line_costs_only_itself(tmp_path, recipe):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "train/lo')
    sink = JsonlSink()
    sink.open(tmp_path, recipe, {})
    sink.log(2, {"train/loss": 1.0})
    sink.close("succeeded")
    assert [row["step"] for row in jsonl.read(path)] == [1, 2]


def test_a_tail_gives_whole_new_lines_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    tail = Tail(path)
    assert tail.rows() == []
    path.write_text('{"a": 1}\n{"a": 2')
    assert tail.rows() == [{"a": 1}]
    with path.open("a") as stream:
        stream.write("}\n")
    assert tail.rows() == [{"a": 2}] and tail.rows() == []


def test_an_undescribed_key_is_kept_and_reported_once(tmp_path, recipe):
    sink = JsonlSink()
    sink.open(tmp_path, recipe, {})
    for step in (1, 2):
        sink.log(step, {"train/novelty": 1.0})
    sink.close("succeeded")
    assert [row["train/novelty"] for row in jsonl.read(tmp_path / "metrics.jsonl")] == [1.0, 1.0]
    assert [row["kind"] for row in jsonl.read(tmp_path / "events.jsonl")] == ["unknown_metric"]


class Broken:
    """A sink that fails in one of its methods."""

    def __init__(self, where: str):
        self.where, self.calls = where, []

    def _do(self, method: str) -> None:
        self.calls.append(method)
        if method == self.where:
            raise OSError("the far end is gone")

    def open(self, run_dir, recipe, provenance):
        self._do("open")

    def log(self, step, values):
        self._do("log")

    def event(self, kind, message):
        self._do("event")

    def close(self, state):
        self._do("close")


@pytest.mark.parametrize("where", ["open", "log", "event", "close"])
def test_a_failing_sink_is_dropped_with_one_warning_and_the_others_go_on(tmp_path, recipe, capsys, where):
    broken = Broken(where)
    sinks = MultiSink([JsonlSink(), broken])
    sinks.open(tmp_path, recipe, {})
    sinks.event("note", "before")
    for step in (1, 2, 3):
        sinks.log(step, {"train/loss": 1.0})
    sinks.close("succeeded")
    assert [row["step"] for row in jsonl.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert sinks.dropped == ["Broken"] and broken.calls.count(where) == 1
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "the far end is gone" in warnings[0]


def test_a_recipe_says_which_sinks_there_are(recipe):
    def kinds(sinks):
        return [type(sink).__name__ for sink in sinks.sinks]

    assert kinds(make_sinks(recipe)) == ["JsonlSink", "ConsoleSink"]
    offline = recipe.with_changes({"tracking.wandb": "offline"})
    assert kinds(make_sinks(offline, console=False)) == ["JsonlSink", "WandbSink"]


def test_a_long_run_writes_few_lines_where_there_is_no_terminal(tmp_path, recipe):
    stream = io.StringIO()
    sink = ConsoleSink(stream, every=30.0)
    sink.open(tmp_path, recipe, {})
    for step in range(1, 101):
        sink.log(step, {"train/loss": 1 / step, "perf/tokens_per_s": 12_300.0})
    sink.close("succeeded")
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 4, lines
    assert "loss 0.01" in lines[-1] and "12.3k tokens/s" in lines[-1] and "100/100" in lines[-1]


def test_a_terminal_gets_one_bar_with_loss_speed_and_time_left():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    bar = Progress(50, "trial", stream=stream)
    assert bar.mode == "bar"
    for step in range(1, 51):
        bar.update(step, {"train/loss": 0.5, "perf/tokens_per_s": 900.0})
    bar.close("succeeded")
    text = stream.getvalue()
    assert text.count("\n") == 1 and "\r" in text
    assert "loss 0.5" in text and "900 tokens/s" in text and "50/50" in text and "<" in text


def test_a_notebook_gets_one_output_that_is_updated(monkeypatch):
    outputs = []

    class Handle:
        def update(self, bundle, raw):
            outputs[-1] = bundle

    def display(bundle, raw, display_id):
        outputs.append(bundle)
        return Handle()

    module = types.ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    progress = Progress(10, "trial", mode="notebook")
    for step in range(1, 11):
        progress.update(step, {"train/loss": 0.25})
    progress.close("succeeded")
    assert (
        len(outputs) == 1 and "10/10" in outputs[0]["text/plain"] and 'value="10"' in outputs[0]["text/html"]
    )
    assert not in_notebook()


def test_the_time_left_comes_from_the_speed_of_this_watch(monkeypatch):
    from lab_utils.telemetry import console

    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = Progress(40, "trial", mode="lines", stream=io.StringIO())
    progress.update(10)  # a resumed run begins here
    assert progress.remaining() is None
    now[0] += 20
    progress.update(20)
    assert progress.remaining() == pytest.approx(40.0)
