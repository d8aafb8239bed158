"""Runs under the real supervisor and torchrun, with a stand-in for the worker: how they begin, live, end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from lab_utils.errors import RunError
from lab_utils.runs import commands
from lab_utils.runs.api import Run, attach, launch
from lab_utils.runs.directory import RunDirectory, create

pytestmark = pytest.mark.slow  # real processes: minutes

ATTACHED = """
import sys, time
from lab_utils.recipe import Recipe
from lab_utils.runs import checks, provenance
from lab_utils.runs.api import launch
checks.check_data = lambda recipe: None
provenance.data_hashes = lambda recipe: {}
print(launch(Recipe.load(sys.argv[1])).name, flush=True)
time.sleep(600)
"""


def until(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("not in time")


def rank_pids(run: Run) -> dict[int, int]:
    """Process numbers by rank, from the first line of each rank's log."""
    found = {}
    for path in run.path.glob("logs/rank-*.log"):
        words = path.read_text().split()
        if "process" in words:
            found[int(path.stem.removeprefix("rank-"))] = int(words[words.index("process") + 1].rstrip(","))
    return found


def processes(run: Run) -> list[psutil.Process]:
    """Everything that still runs for this run."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(run.path) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_run_from_launch_to_its_end(stand_in, recipe, capsys):
    run = launch(recipe)
    assert run.state in ("queued", "running") and not (run.path / "checkpoints").exists()
    run.wait(timeout=60)
    status = run.status
    assert status["state"] == "succeeded" and status["step"] == 20 and status["world_size"] == 2
    assert status["finished"] >= status["started"] >= status["created"]
    assert list(run.metrics().index) == list(range(1, 21)) and run.metrics()["train/loss"][20] == 0.05
    assert {p.name for p in (run.path / "logs").iterdir()} == {"launcher.log", "rank-0.log", "rank-1.log"}
    assert "rank 1 starts at step" in run.logs(rank=1) and "rank-0.log" in run.logs()
    script = (run.path / "launch.sh").read_text()
    assert "--nproc-per-node 2" in script and str(run.path) in script
    assert run.directory.provenance["recipe_hash"] == recipe.hash
    assert processes(run) == [] and len(capsys.readouterr().err.splitlines()) < 8
    assert repr(run) == f"<Run {run.name}: succeeded, step 20 of 20>"


def test_a_killed_rank_fails_the_run_with_a_sentence_and_resume_goes_on(stand_in, recipe, capsys):
    stand_in(seconds=0.1)
    run = launch(recipe)
    until(lambda: run.directory.checkpoints() and run.status["step"] >= 11)
    os.kill(rank_pids(run)[1], signal.SIGKILL)
    with pytest.raises(RunError) as caught:
        run.wait(timeout=60)
    assert "Rank 1 was killed by SIGKILL" in str(caught.value) and "\n" not in str(caught.value)
    assert f"lab runs resume {run.name}" in str(caught.value)
    assert run.status["failed_rank"] == 1 and "end of the log" in capsys.readouterr().err
    assert processes(run) == []

    stand_in()
    attach(run.name).resume().wait(timeout=60, progress=False)
    assert run.state == "succeeded" and run.status["error"] is None
    starts = [int(line.split()[-1]) for line in run.logs(rank=0).splitlines() if "starts at step" in line]
    assert starts[0] == 0 and starts[1] >= 10, "it goes on from a checkpoint"
    assert list(run.metrics().index) == list(range(1, 21))


def test_an_error_for_the_user_is_the_runs_error_word_for_word(stand_in, recipe):
    stand_in(fail={"rank": 1, "step": 3, "how": "user_error"})
    run = launch(recipe)
    with pytest.raises(RunError):
        run.wait(timeout=60, progress=False)
    assert run.status["error"] == "train.jsonl, line 7: 'messages' is missing; add it."
    assert "Traceback" in run.logs(rank=1), "the log has the rest"


def test_a_run_outlives_the_process_that_launched_it_and_is_stopped_from_another(stand_in, recipe, tmp_path):
    stand_in(seconds=0.1)
    long = recipe.with_changes({"schedule.steps": 10_000})
    (tmp_path / "long.yaml").write_text(long.to_yaml())
    command = [sys.executable, "-c", ATTACHED, str(tmp_path / "long.yaml")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    name = parent.stdout.readline().strip()
    os.killpg(parent.pid, signal.SIGKILL)
    parent.communicate()

    run = attach(name)
    step = until(lambda: run.status["step"])
    until(lambda: run.status["step"] > step + 2)
    with pytest.raises(RunError, match="follow it with lab runs show"):
        run.resume()
    with pytest.raises(RunError, match=r"is still running at step \d+ after 0.2 s"):
        run.wait(timeout=0.2, progress=False)
    run.stop(checkpoint=True, wait=30)
    assert run.state == "stopped" and processes(run) == []
    step = run.status["step"]
    assert run.directory.checkpoints()[-1].name == f"step-{step:06d}"


def test_a_run_whose_processes_all_vanish_is_lost_and_can_be_resumed(stand_in, recipe, monkeypatch):
    stand_in(seconds=0.1)
    run = launch(recipe)
    until(lambda: run.directory.checkpoints())
    job = [run.status["pid"], int(run.status["job"].rpartition(":")[2])]
    for process in [*reversed(job), *rank_pids(run).values()]:
        os.kill(process, signal.SIGKILL)
    until(lambda: processes(run) == [])
    assert run.state == "running", "a heartbeat of a moment ago is no proof"
    run.directory.write_status(heartbeat=time.time() - 60)
    assert run.state == "lost" and "lab runs resume" in run.status["error"]
    stand_in()
    run.resume().wait(timeout=60, progress=False)
    assert run.state == "succeeded"


def test_ranks_end_with_a_killed_torchrun(stand_in, recipe):
    stand_in(seconds=0.1)
    run = launch(recipe.with_changes({"schedule.steps": 10_000}))
    until(lambda: run.status["step"] > 2)
    os.kill(run.status["pid"], signal.SIGKILL)
    until(lambda: processes(run) == [])
    assert run.state == "failed"
    assert "exit code -9" in run.status["error"]


def test_two_launches_at_once_are_two_runs(stand_in, recipe):
    runs = [launch(recipe.with_changes({"cluster.nproc": 1})) for _ in range(2)]
    assert runs[0].path != runs[1].path
    for run in runs:
        run.wait(timeout=60, progress=False)
        assert run.state == "succeeded" and len(run.metrics()) == 20


# -- the command line ----------------------------------------------------------------------------------

# The root command with these two verbs alone: what the others import is no business of this test.
ROOT = "from lab_utils import cli; cli.VERBS = {v: cli.VERBS[v] for v in ('run', 'runs')}; cli.main()"
LAB = [sys.executable, "-c", ROOT]


def lab(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([*LAB, *words], capture_output=True, text=True)


def verb(*words: str) -> str:
    """What ``lab runs WORDS`` prints, in this process."""
    done = CliRunner().invoke(commands.app, words)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_verbs_follow_a_run_and_ctrl_c_saves_and_stops_it(stand_in, recipe, tmp_path):
    stand_in(seconds=0.1)
    # The verbs check the data for themselves: a small split is checked quickly.
    long = recipe.with_changes({"schedule.steps": 10_000, "data.train.0.split": "validation"})
    (tmp_path / "long.yaml").write_text(long.to_yaml())
    attached = subprocess.Popen(
        [*LAB, "run", str(tmp_path / "long.yaml"), "--nproc", "1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Tests that a shell runs behind it ignore Ctrl-C, and what they start would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    root = Path(os.environ["ASCENT_RUNS"])
    until(lambda: list(root.glob("*/metrics.jsonl")))
    until(lambda: (attach("last", root).status["step"] or 0) > 2)

    shown = json.loads(verb("show", "last", "--json"))
    assert {"run", "path", "state", "step", "metrics"} <= set(shown)
    assert shown["state"] == "running" and shown["metrics"]["train/loss"] > 0
    assert [row["run"] for row in json.loads(verb("list", "--json"))] == [shown["run"]]
    assert shown["run"] in verb("list") and "running" in verb("show")

    attached.send_signal(signal.SIGINT)
    _, err = attached.communicate(timeout=30)
    assert attached.returncode == 0 and "lab runs resume" in err and "Traceback" not in err
    run = attach("last", root)
    assert run.state == "stopped" and run.directory.checkpoints()

    assert json.loads(verb("resume", "last", "--detach", "--json"))["run"] == run.name
    until(lambda: run.status["state"] == "running" and run.status["step"] > 5)
    assert json.loads(verb("stop", run.name[:8], "--json")) == {"run": run.name, "state": "stopped"}
    assert "starts at step" in json.dumps(json.loads(verb("logs", "--rank", "0", "--json")))


@pytest.mark.parametrize("words", [("stop",), ("resume",), ("logs", "--rank", "7"), ("show", "nothing")])
def test_a_verb_that_cannot_do_its_work_says_so_in_one_sentence(tmp_path, recipe, monkeypatch, words):
    monkeypatch.setenv("ASCENT_RUNS", str(tmp_path))
    create(recipe, tmp_path).write_status(state="running")
    RunDirectory(next(tmp_path.iterdir())).write_status(state="succeeded", step=20)
    done = lab("runs", *words)
    assert done.returncode != 0 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
