"""The live view as a person has it: what it shows of a run's files, what it sends, what its buttons do. No browser."""

import gc
import json
import os
import re
import struct
import subprocess
import sys
import time
import weakref
from html import unescape
from pathlib import Path

import ipywidgets
import numpy as np
import psutil
import pytest

from lab_utils.errors import RunError
from lab_utils.launchers._base import JobInfo
from lab_utils.recipe import Recipe
from lab_utils.runs.api import Run, launch
from lab_utils.runs.directory import create
from lab_utils.runs.states import JobState
from lab_utils.telemetry import chip_log, jsonl
from lab_utils.widgets import _board, _standing
from lab_utils.widgets._board import Board
from lab_utils.widgets._chart import CHUNK, Curves, panels_of
from lab_utils.widgets._standing import Told, wandb_place
from lab_utils.widgets.live import LiveView

RECIPE = Recipe.load("sft_tiny").with_changes({"name": "watched", "schedule.steps": 400})
STAND_IN = Path(__file__).parents[1] / "runs"


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)
    return found


def log(run, *steps, **values):
    for step in steps:
        row = {"step": step, "time": 100.0 + 2 * step, "train/loss": 1 / step, "perf/tokens_per_s": 1000.0}
        run.directory.append("metrics.jsonl", {**row, **values})


def plain(html: str) -> str:
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)))


@pytest.fixture
def run(tmp_path):
    found = Run(create(RECIPE, tmp_path / "runs"))
    found.directory.write_status(state="running", step=0)
    return found


@pytest.fixture
def watch():
    """A board that looks when the test says so."""
    boards = []

    def make(run):
        board = Board(run, every=1e6)
        until(lambda: board.handle.spent.calls and not board.behind)
        board.handle.cancel()
        board.settle()
        boards.append(board)
        return board

    yield make
    for board in boards:
        board.close()


@pytest.fixture
def sent(monkeypatch):
    """What goes to the browser: the names of the traits and the bytes of each message."""
    messages = []

    def record(self, key=None):
        keys = [key] if isinstance(key, str) else list(key if key is not None else self.keys)
        state = self.get_state(keys)
        size = sum(
            len(v) if isinstance(v, bytes) else len(json.dumps(v, default=str)) for v in state.values()
        )
        messages.append((type(self).__name__, sorted(keys), size))

    monkeypatch.setattr(ipywidgets.Widget, "send_state", record)
    return messages


class Answered:
    """A launcher that has answered; in place of the board's ``Asker``."""

    def __init__(self, stored: str, **job):
        self.answer = Told(stored, {"state": stored}, JobInfo(**job))

    def ask(self, every):
        pass

    def forget(self):
        pass


def drawn(curves: Curves) -> dict[str, np.ndarray]:
    """What the browser makes of the pieces: mean, smallest, largest by metric."""
    pieces = []
    for slot, (_, first, count) in enumerate(curves.pieces):
        assert first == CHUNK * slot
        piece = np.frombuffer(getattr(curves, f"piece{slot}"), dtype="<f4")
        pieces.append(piece.reshape(count, len(curves.columns), 3))
    whole = np.concatenate(pieces)
    return {key: whole[:, i] for i, key in enumerate(curves.columns)}


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_the_curves_are_the_runs_metrics(run, watch):
    log(run, *range(1, 101))
    log(run, 100, **{"eval/loss": 0.5})
    board = watch(run)
    found, metrics = drawn(board.curves), run.metrics()
    there = ~np.isnan(found["train/loss"][:, 0])
    np.testing.assert_allclose(found["train/loss"][there, 0], metrics["train/loss"], rtol=1e-6)
    np.testing.assert_array_equal(found["step"][there, 0], metrics.index)
    assert np.nanmax(found["eval/loss"]) == 0.5
    titles = [panel["title"] for panel in board.curves.panels]
    assert titles[0] == "Alignment loss" and board.curves.panels[0]["wide"]
    assert {"Throughput", "Model FLOPs utilisation", "Step time"} <= set(titles), (
        "what will come is announced"
    )
    assert all(panel["unit"] for panel in board.curves.panels)


def test_state_step_and_time_left_stand_above(run, watch):
    board = watch(run)
    log(run, *range(1, 101))
    run.directory.write_status(step=100)
    board.look()
    said = plain(board.head.value)
    assert "running" in said and run.name in said and "step 100 of 400" in said
    assert "10 min left" in said and "loss 0.01" in said and "tokens/s 1000" in said


def test_a_run_in_the_queue_says_its_place_and_why(run, watch):
    run.directory.write_status(state="queued")
    board = watch(run)
    board.asker = Answered("queued", state=JobState.PENDING, detail="Resources", position=3)
    board.look()
    assert "place 3 in the queue: Resources" in plain(board.head.value)
    assert "has its place" in board.curves.waiting and "has its place" in board.chips.waiting
    run.directory.write_status(state="running")
    board.asker = Answered("running", state=JobState.RUNNING, seconds_left=7200.0)
    board.look()
    assert "2 h 00 min to the job's time limit" in plain(board.head.value)


def test_an_answer_about_an_earlier_state_is_not_taken_for_the_present(run, watch):
    board = watch(run)
    board.asker = Answered("queued", state=JobState.PENDING, position=9)
    board.look()
    assert "running" in plain(board.head.value) and "place 9" not in plain(board.head.value)


def test_a_failed_run_shows_its_reason_as_text(run, watch):
    run.directory.write_status(state="failed", error="Rank 1 <was> killed; lab runs resume it.")
    board = watch(run)
    assert "Rank 1 &lt;was&gt; killed" in board.head.value


def test_the_objectives_own_metrics_come_before_speed():
    titles = [panel.title for panel in panels_of("grpo")]
    assert titles[:3] == ["Alignment loss", "Verified reward", "Held-out answers right"]
    assert titles.index("Tokens clipped") < titles.index("Throughput") < titles.index("Gradient norm")
    for kind in ("sft", "preference", "reward", "grpo", "distill", "of another version"):
        assert len({panel.title for panel in panels_of(kind)}) == len(panels_of(kind)) > 6


def test_errors_of_any_log_are_lifted_out_and_the_log_ends_as_it_ends(run, watch):
    board = watch(run)
    (run.directory.logs / "rank-0.log").write_text("".join(f"step {i}\n" for i in range(500)))
    (run.directory.logs / "rank-7.log").write_text("fine\nRuntimeError: EI0002 <here>\n")
    (run.directory.logs / "rank-9.log").write_text("RuntimeError: EI0002 <here>\n")
    run.directory.append("events.jsonl", {"kind": "alert_nan", "message": "The loss is not finite."})
    board.follower.logs._listed = -1e9
    board.look()
    assert board.journal.tail["name"] == "rank-0.log" and board.journal.tail["lines"][-1] == "step 499"
    assert len(board.journal.tail["lines"]) <= 80
    said = plain(board.errors.value)
    assert (
        "EI0002 &lt;here&gt;" in board.errors.value
        and said.count("EI0002 <here>") == 1
        and "rank-7 and 1 more" in said
    )
    assert "look at the rank that ended first" in said, "what a known error means"
    assert "The loss is not finite." in said


def test_samples_are_readable_and_the_newest_come_first(run, watch):
    for step in range(1, 40):
        row = {"step": step, "prompt": "2+3?", "completion": f"it is {step}", "reward": 0.5}
        run.directory.append("samples.jsonl", row)
    board = watch(run)
    first = board.journal.samples[0]
    assert first == {"head": "step 39 · reward 0.5", "prompt": "2+3?", "completion": "it is 39"}
    assert len(board.journal.samples) == 12


def write_chips(run, node, *, util=60.0, at=None, chips=16, **more):
    rows = [
        {
            "index": i,
            "name": "Ascend910",
            "util": util,
            "used_mib": 50.0,
            "total_mib": 100.0,
            "temp": 55,
            **more,
        }
        for i in range(chips)
    ]
    row = {"time": time.time() if at is None else at, "chips": rows}
    jsonl.append(chip_log.node_file(run.path, node), row)


def test_chips_come_worst_node_first_with_what_is_known_of_each(run, watch):
    write_chips(run, 0, util=70.0)
    write_chips(run, 1, util=3.0)
    write_chips(run, 2, util=80.0, health="Warning", power=300.4)
    write_chips(run, 3, util=90.0, at=time.time() - 900)
    write_chips(run, 4, util=None)
    board = watch(run)
    nodes = board.chips.nodes
    assert [node["number"] for node in nodes[:3]] == [2, 3, 1] and nodes[-1]["number"] == 4
    assert nodes[1]["silent"] and not nodes[0]["silent"] and nodes[0]["bad"] == [1]
    assert board.chips.healths == ["", "Warning"] and board.chips.product == "Ascend910"
    cells = [struct.unpack_from("<BBBBHH", board.chips.cells, 8 * i) for i in range(5 * 16)]
    assert cells[1] == (80, 50, 55, 1, 300, 1)
    assert cells[-1] == (255, 50, 55, 0, 65535, 15), "what a chip doesn't say is no zero"
    assert list(board.chips.trends[:24])[-1] == 80 and board.chips.trends[0] == 255


def test_two_thousand_chips_are_a_few_kilobytes(run, watch, sent):
    for node in range(128):
        write_chips(run, node, util=float(node % 100))
    board = watch(run)
    assert sum(node["chips"] for node in board.chips.nodes) == 2048 and len(board.chips.cells) == 8 * 2048
    assert max(size for name, _, size in sent if name == "ChipStrip") < 40_000


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_one_more_step_sends_one_piece(run, watch, sent):
    log(run, *range(1, 301))
    board = watch(run)
    sent.clear()
    log(run, 301)
    board.look()
    names = {key for name, keys, _ in sent if name == "Curves" for key in keys if key.startswith("piece")}
    assert names == {"piece9", "pieces"} and sum(size for _, _, size in sent) < 12_000
    sent.clear()
    board.look()
    assert sent == [], "nothing new, nothing sent"


def test_ten_thousand_steps_are_no_more_to_send_than_five_hundred(run, watch, sent):
    row = {"train/loss": 0.5, "perf/tokens_per_s": 9.0, "perf/mfu": 0.3}
    lines = (jsonl.encode({"step": s, "time": float(s), **row}) for s in range(1, 10_001))
    (run.path / "metrics.jsonl").write_text("".join(lines))
    board = watch(run)
    assert board.follower.series.newest == 10_000
    assert sum(len(getattr(board.curves, f"piece{slot}")) for slot in range(18)) < 576 * 4 * 12 + 1
    sent.clear()
    log(run, 10_001)
    board.look()
    assert sum(size for _, _, size in sent) < 12_000


def test_a_run_that_has_ended_is_read_once(run):
    log(run, *range(1, 401))
    run.directory.write_status(state="succeeded", step=400, heartbeat=time.time() - 3600)
    board = Board(run, every=0.01)
    until(lambda: not board.handle.alive)
    assert board.handle.spent.calls < 5 and board.handle.error is None
    assert "succeeded" in board.head.value and len(board.curves.pieces) == 13
    assert (
        board.stop.disabled and board.stop_now.disabled and board.resume.disabled and not board.fork.disabled
    )
    board.close()


def test_a_view_that_was_cleared_from_its_page_reads_nothing_until_it_is_shown_again(run, watch):
    board = watch(run)
    board.curves.watched = 0
    log(run, 1)
    board.look()
    assert board.curves.pieces == []
    board.curves.watched = 1
    board.look()
    assert board.curves.pieces == [[0, 0, 2]]


def test_a_view_that_was_closed_is_gone(run):
    view = LiveView(run)
    board = weakref.ref(view.board)
    handle = view.board.handle
    view.close()
    assert not handle.alive
    until(lambda: gc.collect() >= 0 and board() is None)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_recipe_of_another_version_keeps_no_curve_from_being_seen(run, watch):
    (run.path / "recipe.yaml").write_text("optimum: {}\n")
    log(run, 1, 2)
    board = watch(run)
    assert np.nanmax(drawn(board.curves)["train/loss"]) == 1.0
    board.fork.click()
    assert "optimum" in plain(board.status.value)
    board.wandb.click()
    assert "optimum" in plain(board.status.value)


def test_a_run_that_was_deleted_says_so_and_is_left_alone(run, watch):
    board = watch(run)
    run.directory.write_status(state="failed")
    run.delete()
    board.start()
    board.follower.status = {}
    until(lambda: not board.handle.alive)
    assert "is gone" in plain(board.status.value)


def test_an_error_while_looking_is_said_and_the_next_look_goes_on(run, watch, monkeypatch):
    board = watch(run)
    poll = board.follower.poll
    monkeypatch.setattr(board.follower, "poll", lambda seconds: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        board.look()  # the timer keeps it in handle.error
    assert "could not be brought up to date (ZeroDivisionError" in plain(board.status.value)
    monkeypatch.setattr(board.follower, "poll", poll)
    log(run, 1)
    board.look()
    assert board.curves.pieces


# -- buttons -----------------------------------------------------------------------------------------------------------


def test_stop_asks_for_a_checkpoint_and_stop_now_only_when_pressed_twice(run, watch):
    board = watch(run)
    board.stop.click()
    board.settle()
    assert run.directory.control["action"] == "checkpoint_and_stop"
    assert "saves a checkpoint" in plain(board.status.value)
    board.stop_now.click()
    assert run.directory.control["action"] == "checkpoint_and_stop"
    assert board.stop_now.button_style == "danger" and "press again" in plain(board.status.value)
    board.stop_now.click()
    board.settle()
    assert run.directory.control["action"] == "stop" and board.stop_now.description == "Stop now"
    assert "without saving" in plain(board.status.value)
    run.directory.write_status(state="stopped")
    board.look()
    assert not plain(board.status.value).strip()  # it was said of a run that went on


def test_a_first_press_that_is_not_confirmed_is_forgotten(run, watch, monkeypatch):
    monkeypatch.setattr(_board, "CONFIRM_SECONDS", 0.01)
    board = watch(run)
    board.stop_now.click()
    time.sleep(0.02)
    board.look()
    assert board.stop_now.description == "Stop now" and board.stop_now.button_style == ""
    board.stop_now.click()
    assert run.directory.control["action"] is None


def test_what_a_button_cannot_do_is_a_sentence(run, watch):
    board = watch(run)
    run.directory.write_status(state="failed")
    board.stop.click()
    board.settle()
    assert "there is nothing to stop" in plain(board.status.value)
    assert not board.busy


def test_resume_runs_beside_the_kernel_and_the_view_goes_on(run, watch, monkeypatch):
    run.directory.write_status(state="stopped", heartbeat=time.time() - 3600)
    board = watch(run)
    assert not board.resume.disabled and board.stop.disabled

    def resume(asked):
        assert asked is run
        run.directory.write_status(state="queued")
        return "Resumed: queued."

    monkeypatch.setattr(_board, "resume_beside", resume)
    board.resume.click()
    board.settle()
    until(lambda: "queued" in board.head.value)
    assert board.handle.alive and "Resumed: queued." in plain(board.status.value)


def test_a_resume_that_is_refused_says_why(run, watch):
    run.directory.write_status(state="succeeded", step=400)
    board = watch(run)
    with pytest.raises(RunError, match="has done all its 400 steps"):
        _board.resume_beside(run)
    board.resume.click()
    board.settle()
    assert "has done all its 400 steps" in plain(board.status.value)


def test_fork_opens_a_form_with_the_runs_recipe(run, watch, monkeypatch):
    asked = []

    class Form:
        def __init__(self, recipe, *, root):
            asked.append((recipe, root))
            self.widget = ipywidgets.HTML("form")

    monkeypatch.setattr("lab_utils.widgets.form.LaunchForm", Form)
    board = watch(run)
    board.fork.click()
    assert asked == [(RECIPE, run.path.parent)] and board.below.children[0].value == "form"


@pytest.mark.parametrize(
    ("changes", "address", "words"),
    [
        ({"tracking.wandb": "disabled"}, None, "disabled"),
        ({}, None, "lab wandb sync {path} --url"),
        ({"tracking.base_url": "https://w.example.org"}, None, "lab wandb sync {path}"),
        (
            {
                "tracking.wandb": "online",
                "tracking.base_url": "https://w.example.org/",
                "tracking.entity": "lab",
            },
            "https://w.example.org/lab/ascent/runs/",
            "{name}",
        ),
        (
            {"tracking.wandb": "online", "tracking.base_url": "https://w.example.org"},
            "https://w.",
            "Project ascent",
        ),
    ],
)
def test_wandb_is_a_link_or_the_command_that_brings_it_there(tmp_path, watch, changes, address, words):
    run = Run(create(RECIPE.with_changes(changes), tmp_path))
    found, sentence = wandb_place(run)
    assert words.format(path=run.path, name=run.name) in sentence
    assert found is None if address is None else found.startswith(address)
    board = watch(run)
    board.wandb.click()
    assert ("<a href=" in board.status.value) == (address is not None)


def test_a_run_in_the_usual_folder_is_meant_by_its_name(run, monkeypatch):
    monkeypatch.setenv("ASCENT_RUNS", str(run.path.parent))
    assert f"lab wandb sync {run.name} --url" in wandb_place(run)[1]


def test_the_address_that_the_server_gave_is_the_link(tmp_path, watch):
    changes = {"tracking.wandb": "online", "tracking.base_url": "https://w.example.org"}
    run = Run(create(RECIPE.with_changes(changes), tmp_path))
    (run.path / "wandb").mkdir(exist_ok=True)
    (run.path / "wandb" / "address").write_text("https://w.example.org/team/ascent/runs/0123\n")
    assert wandb_place(run)[0] == "https://w.example.org/team/ascent/runs/0123"


# -- without anybody, and as a whole -----------------------------------------------------------------------------------


def test_headless_it_is_html_with_the_same_numbers_and_no_script(run, monkeypatch):
    monkeypatch.setenv("ASCENT_HEADLESS", "1")
    log(run, *range(1, 101))
    write_chips(run, 0, util=40.0, health="OK")
    (run.directory.logs / "rank-0.log").write_text("a line & more\n")
    view = LiveView(run)
    bundle = view._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"} and view._board is None
    page = bundle["text/html"]
    assert "<script" not in page and "widget" not in page and "<polyline" in page
    said = plain(page)
    assert "step 100 of 400" in said and "Alignment loss" in said and "nat / token" in said and "0.01" in said
    assert "node 0 16 40 40 50 55 well" in said and "a line & more" in said


def test_an_empty_run_can_be_shown_too(run, monkeypatch):
    monkeypatch.setenv("ASCENT_HEADLESS", "1")
    assert "No step has been logged yet" in LiveView(run).html()


def test_a_kernel_shows_it_without_what_it_must_not_hold(run):
    code = (
        "import sys; from lab_utils import LiveView\n"
        "bundle = LiveView(sys.argv[1])._repr_mimebundle_()\n"
        "print('application/vnd.jupyter.widget-view+json' in bundle)\n"
        "print({'torch', 'colossalai', 'pandas', 'matplotlib', 'wandb', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)],
        env={**os.environ, "ASCENT_HEADLESS": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:2] == ["True", "set()"]


def test_a_launcher_that_answers_late_holds_nothing_up(run, watch, monkeypatch):
    board = watch(run)
    waiting = []
    monkeypatch.setattr(_standing, "ask_launcher", lambda run: waiting.append(1) or time.sleep(0.5))
    board.asker = _standing.Asker(lambda: _standing.ask_launcher(run))
    began = time.monotonic()
    board.look()
    board.look()
    assert time.monotonic() - began < 0.45 and waiting == [1]


@pytest.mark.slow
def test_a_real_run_is_watched_stopped_resumed_and_watched_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCENT_WORKER_MODULE", "stand_in_worker")
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.setenv("STAND_IN", json.dumps({"seconds": 0.2}))
    run = launch(RECIPE.with_changes({"cluster.nproc": 1, "tracking.wandb": "disabled"}), root=tmp_path)
    board = Board(run, every=0.1)
    until(lambda: "running" in board.head.value and board.curves.pieces, 120)
    board.stop.click()
    until(lambda: "stopped" in board.head.value and not board.resume.disabled, 120)
    monkeypatch.setenv("STAND_IN", json.dumps({"seconds": 0.001}))
    board.resume.click()
    until(lambda: "succeeded" in board.head.value, 240)
    until(lambda: not board.handle.alive, 90)
    assert "step 400 of 400" in plain(board.head.value) and board.handle.error is None
    found = drawn(board.curves)
    np.testing.assert_allclose(found["train/loss"][1:, 0], run.metrics()["train/loss"], rtol=1e-6)
    board.close()


@pytest.mark.slow
def test_the_measurement_of_a_played_run_has_its_numbers_and_leaves_nothing_behind(monkeypatch):
    from lab_utils.bench import live

    monkeypatch.setattr(live, "WARM", 0.5)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    found = live.bench_live(0.05, nodes=3, chips=2, steps=700, step_seconds=0.2, chip_seconds=0.2)
    assert found["updates"] >= 2 and 0 < found["cpu_percent"] < 200 and found["kib_a_s"] > 0
    assert found["update_ms"]["longest"] >= found["update_ms"]["p99"] > 0 and found["rss_mib"][0] > 20
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before
