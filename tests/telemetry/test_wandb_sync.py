"""Offline runs reach the server that is named, in order, once, and again only where something is new."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lab_utils.errors import RunError
from lab_utils.telemetry import wandb_server, wandb_sync
from lab_utils.telemetry.wandb import NOWHERE, run_id
from lab_utils.telemetry.wandb_reader import Piece, pieces
from lab_utils.telemetry.wandb_server import Record, check, server
from lab_utils.telemetry.wandb_sync import Job, plan, sync

HERE = Path(__file__).parent
URL = "http://wandb.example.org"
STAND_IN = """
import sys, time
from pathlib import Path
*words, path = sys.argv[1:]
path = Path(path)
here = Path(__file__).parent
began = time.time()
together = here / "together"
(here / f"{path.name[-7:]}.began").touch()
if together.exists() and path.name[-7:] in together.read_text():
    while not all((here / f"{name}.began").exists() for name in together.read_text().split()):
        if time.time() > began + 60:
            sys.exit("nobody came")
        time.sleep(0.02)
fails = here / f"{path.name}.fails"
left = int(fails.read_text()) if fails.exists() else 0
if left:
    fails.write_text(str(left - 1))
    print("wandb: ERROR the network is down")
else:
    log = next(path.glob("run-*.wandb"))
    log.with_name(log.name + ".synced").touch()
with (here / "calls").open("a") as calls:
    calls.write(f"{path.name} {began} {time.time()} {' '.join(words)}\\n")
"""


def make(root, name, *starts, node="aaaa"):
    """A run with offline pieces of one id, one a start."""
    for start in starts:
        folder = root / name / "wandb" / f"offline-run-20260101_0000{start:02}-{node}"
        folder.mkdir(parents=True)
        (folder / f"run-{node}.wandb").write_bytes(b"x" * (100 + start))
    return root / name


@pytest.fixture
def uploader(tmp_path, monkeypatch):
    """A stand-in for the wandb command; returns its calls as (piece, begin, end, words)."""
    script = tmp_path / "stand_in" / "wandb.py"
    script.parent.mkdir()
    script.write_text(STAND_IN)
    monkeypatch.setattr(wandb_sync, "command", lambda *words: [sys.executable, str(script), *words])

    def calls():
        path = script.parent / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(n, float(b), float(e), w) for n, b, e, w in (line.split(" ", 3) for line in lines)]

    calls.fails = lambda piece, times: (script.parent / f"{piece}.fails").write_text(str(times))
    calls.meet = lambda *pieces: (script.parent / "together").write_text(" ".join(pieces))
    return calls


def states(rows):
    return [(row["run"], row["piece"][-7:], row["state"]) for row in rows]


# -- nothing leaves unasked ----------------------------------------------------------------------------


def test_nothing_leaves_the_machine_without_a_server_that_somebody_named():
    for named, recipe in ((None, None), ("", ""), (None, NOWHERE)):
        with pytest.raises(RunError, match="nothing leaves this machine unasked: give --url"):
            server(named, recipe, "trial")
    assert (
        server("http://a/", "http://b", "trial") == "http://a"
        and server(None, "http://b", "trial") == "http://b"
    )
    with pytest.raises(RunError, match="no address"):
        server("wandb.example.org", None, "trial")


def test_a_missing_key_and_a_silent_server_are_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(
        RunError, match=r"no key for http://127.0.0.1:9: set WANDB_API_KEY, or run wandb login"
    ):
        check("http://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine 127.0.0.1:9 login user password secret\n")
    with pytest.raises(RunError, match="does not answer"):
        check("http://127.0.0.1:9")


# -- order, record, retries ----------------------------------------------------------------------------


def test_pieces_of_a_run_go_one_after_the_other_and_runs_side_by_side(tmp_path, uploader):
    jobs = [Job(make(tmp_path, "one", 3, 1, 2), URL), Job(make(tmp_path, "two", 6, 4, 5), URL)]
    uploader.meet("01-aaaa", "04-aaaa")  # each waits for the other to have begun
    rows = sync(jobs, parallel=2)
    expected = [("one", k) for k in (1, 2, 3)] + [("two", k) for k in (4, 5, 6)]
    assert states(rows) == [(name, f"{k:02}-aaaa", "uploaded") for name, k in expected]
    spans = {name[-7:-5]: (begin, end) for name, begin, end, _ in uploader()}
    for earlier, later in (("01", "02"), ("02", "03"), ("04", "05"), ("05", "06")):
        assert spans[earlier][1] <= spans[later][0]
    assert {words for *_, words in uploader()} == {"sync --yes --include-synced"}


def test_nodes_of_a_run_go_side_by_side_too(tmp_path, uploader):
    make(tmp_path, "one", 1, node="aaaa")
    run = make(tmp_path, "one", 1, node="bbbb")
    uploader.meet("01-aaaa", "01-bbbb")
    rows = sync([Job(run, URL)], parallel=2)
    assert states(rows) == [("one", "01-aaaa", "uploaded"), ("one", "01-bbbb", "uploaded")]
    assert [row["state"] for row in plan([Job(run, URL)])] == ["done", "done"]  # neither record was lost


def test_what_the_server_has_is_not_sent_again_and_another_server_has_nothing(tmp_path, uploader):
    run = make(tmp_path, "one", 1, 2)
    sync([Job(run, URL)])
    assert [row["state"] for row in sync([Job(run, URL)])] == ["done", "done"] and len(uploader()) == 2
    assert [row["state"] for row in plan([Job(run, "http://other")])] == ["to upload"] * 2
    record = json.loads((run / "wandb" / "synced.json").read_text())
    assert {name[-7:]: kept["size"] for name, kept in record[URL].items()} == {"01-aaaa": 101, "02-aaaa": 102}
    (log,) = run.glob("wandb/*02-aaaa/run-*.wandb")
    log.write_bytes(b"x" * 300)  # it went on
    assert [row["state"] for row in plan([Job(run, URL)])] == ["done", "to upload"]
    assert [row["state"] for row in sync([Job(run, URL)])] == ["done", "uploaded"]


def test_a_fault_of_the_network_is_tried_again_and_a_lasting_one_keeps_the_order(tmp_path, uploader):
    run = make(tmp_path, "one", 1, 2)
    first = next(run.glob("wandb/*01-aaaa")).name
    uploader.fails(first, 2)
    assert [row["state"] for row in sync([Job(run, URL)], pause=0.01)] == ["uploaded", "uploaded"]
    other = make(tmp_path, "two", 4, 5)
    uploader.fails(next(other.glob("wandb/*04-aaaa")).name, 99)
    said = []
    rows = sync([Job(other, URL)], pause=0.01, say=said.append)
    assert [row["state"] for row in rows] == ["failed", "failed"]
    assert "the network is down" in rows[0]["error"] and "waits for" in rows[1]["error"]
    assert len([line for line in said if "failed" in line]) == 2
    uploader.fails(next(other.glob("wandb/*04-aaaa")).name, 0)
    assert [row["state"] for row in sync([Job(other, URL)])] == [
        "uploaded",
        "uploaded",
    ]  # the same command again


def test_an_interrupted_upload_goes_on_where_it_was(tmp_path, uploader):
    run = make(tmp_path, "one", 1, 2, 3)
    job = Job(run, URL)
    Record(run, URL).add(pieces(run)["aaaa"][0], 101)
    assert [row["state"] for row in sync([job])] == ["done", "uploaded", "uploaded"]


def test_a_run_that_goes_on_keeps_its_newest_piece_and_sends_the_others(tmp_path, uploader):
    job = Job(make(tmp_path, "one", 1, 2), URL, active=lambda: True)
    assert [row["state"] for row in plan([job])] == ["to upload", "running"]
    assert [row["state"] for row in sync([job])] == ["uploaded", "running"]
    assert len(uploader()) == 1


def test_scores_that_came_later_are_another_piece(tmp_path, uploader, monkeypatch):
    run = make(tmp_path, "one", 1)
    amended = []

    def amend(self):
        amended.append(self.job.path)
        make(tmp_path, "one", 2)

    monkeypatch.setattr(wandb_sync._Upload, "_amend", amend)
    sync([Job(run, URL)])
    assert amended == []
    (run / "report.json").write_text("{}")
    later = time.time() + 60
    os.utime(run / "report.json", (later, later))
    assert plan([Job(run, URL)])[-1]["piece"] == "report.json"
    assert [row["state"] for row in sync([Job(run, URL)])] == ["done", "uploaded"] and amended == [run]


# -- the real wandb and a stand-in server --------------------------------------------------------------


WRITER = """
import sys, time
from pathlib import Path
from lab_utils.recipe import Recipe
from lab_utils.telemetry.sinks import make_sinks
run_dir, first, last, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
sinks = make_sinks(Recipe.load("sft_tiny"), console=False)
sinks.open(run_dir, Recipe.load("sft_tiny"), {})
for step in range(first, last):
    sinks.log(step, {"train/loss": 1 / step})
    time.sleep(pause)
sinks.close("succeeded")
"""


def writer(run, first, last, pause=0.0):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.Popen([sys.executable, "-c", WRITER, *map(str, (run, first, last, pause))], env=kept)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    sys.path.insert(0, str(HERE))
    from stand_in_server import StandIn

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HOME", str(tmp_path))
    with StandIn() as found:
        yield found
        found.shutdown()


@pytest.mark.slow
def test_the_real_wandb_brings_a_resumed_run_to_a_server(tmp_path, stand_in):
    from lab_utils.runs.directory import write_atomic

    run = tmp_path / "trial-20260101-000000-abcdef"
    run.mkdir()
    for first, last in ((1, 5), (3, 8)):  # it had saved step 2
        assert writer(run, first, last).wait() == 0
    from lab_utils.recipe import Recipe

    write_atomic(run / "recipe.yaml", Recipe.load("sft_tiny").to_yaml())
    write_atomic(run / "status.json", '{"state": "succeeded"}')
    write_atomic(run / "report.json", '{"exact_match": {"value": 0.5}}')
    later = time.time() + 5
    os.utime(run / "report.json", (later, later))

    check(stand_in.url)
    rows = sync([Job(run, stand_in.url)])
    assert [row["state"] for row in rows] == ["uploaded"] * 3 and stand_in.unknown == []
    name = run_id(f"{run.name}/node-0")
    kept = stand_in.runs[name]
    assert (
        kept["complete"] and kept["upsert"]["groupName"] == run.name and kept["upsert"]["jobType"] == "node-0"
    )
    lines = stand_in.lines(name)
    assert [line["train/global_step"] for line in lines] == [1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert [line["_step"] for line in lines] == list(
        range(9)
    )  # the second piece goes on where the first ended
    assert lines[-1]["train/loss"] == 1 / 7
    summary = json.loads(kept["files"]["wandb-summary.json"])
    assert summary["report/exact_match"] == 0.5 and summary["state"] == "succeeded"
    # Nothing of the uploader lies outside the run, and asking again asks nobody.
    assert {p.name for p in tmp_path.iterdir()} == {run.name}
    asked = len(stand_in.asked)
    os.utime(run / "report.json", (0, 0))
    assert [row["state"] for row in sync([Job(run, stand_in.url)])] == ["done"] * 3 and len(
        stand_in.asked
    ) == asked
    # A piece that is sent twice keeps its numbers.
    (run / "wandb" / wandb_server.RECORD).unlink()
    assert [row["state"] for row in sync([Job(run, stand_in.url)])] == ["uploaded"] * 3
    assert [line["train/global_step"] for line in stand_in.lines(name)] == [1, 2, 3, 4, 3, 4, 5, 6, 7]


@pytest.mark.slow
def test_a_run_is_followed_while_it_goes_on(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")  # 15 s otherwise
    run = tmp_path / "trial-20260101-000000-abcdef"
    run.mkdir()
    process = writer(run, 1, 41, 0.5)
    while not any(piece.size for chain in pieces(run).values() for piece in chain):
        time.sleep(0.1)
    name = run_id(f"{run.name}/node-0")
    seen = []

    def watch():
        while process.poll() is None:
            seen.append(len(stand_in.runs[name]["history"]) if name in stand_in.runs else 0)
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()
    rows = sync([Job(run, stand_in.url, active=lambda: process.poll() is None)], live=True)
    assert process.wait() == 0
    assert any(0 < lines < 40 for lines in seen)  # before the run had ended
    assert [row["state"] for row in rows] == ["uploaded"]
    assert [line["train/global_step"] for line in stand_in.lines(name)] == list(range(1, 41))
    assert plan([Job(run, stand_in.url)])[0]["state"] == "done"


@pytest.mark.slow
def test_a_run_that_was_killed_is_not_followed_for_ever(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(wandb_sync, "QUIET", 3.0)
    run = tmp_path / "trial-20260101-000000-abcdef"
    run.mkdir()
    process = writer(run, 1, 1000, 0.5)
    while Piece(next(iter(run.glob("wandb/offline-run-*")), run)).size < 3000:
        time.sleep(0.1)
    threading.Timer(8.0, process.kill).start()
    rows = sync([Job(run, stand_in.url, active=lambda: process.poll() is None)], live=True)
    assert process.wait() != 0
    assert [row["state"] for row in rows] == ["uploaded"]
    steps = [line["train/global_step"] for line in stand_in.lines(run_id(f"{run.name}/node-0"))]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 3
