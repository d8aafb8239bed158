"""The supervisor alone, over a script in the place of torchrun's: final states, signals, insistence."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lab_utils.launchers._base import SCRIPT

IMPATIENT = """
import sys
from lab_utils.launchers import _supervisor as s
from lab_utils.runs.directory import RunDirectory
s.STOP_GRACE, s.KILL_GRACE, s.BEAT = 0.3, 1.0, 0.2
sys.exit(s.Supervisor(RunDirectory(sys.argv[1])).run())
"""


@pytest.fixture
def supervise(run_dir):
    """Start a supervisor over ``script``; all processes are ended with the test."""
    started = []

    def start(script: str) -> subprocess.Popen:
        (run_dir.path / SCRIPT).write_text(script)
        run_dir.write_status(state="queued")
        log = (run_dir.logs / "launcher.log").open("ab")
        started.append(
            subprocess.Popen([sys.executable, "-c", IMPATIENT, str(run_dir.path)], stdout=log, stderr=log)
        )
        log.close()
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize(
    "script, action, state",
    [
        ("exit 0", None, "succeeded"),
        ("exit 0", "checkpoint_and_stop", "stopped"),
        ("echo 'OSError: [Errno 28] No space left on device' >&2; exit 1", None, "failed"),
        ("echo 'OSError: [Errno 28] No space left on device' >&2; exit 1", "checkpoint_and_stop", "failed"),
    ],
)
def test_the_exit_code_and_what_was_asked_decide_the_final_state(run_dir, supervise, script, action, state):
    run_dir.request(action)
    supervise(script).wait(timeout=20)
    status = run_dir.status
    assert status["state"] == state and status["finished"] and status["pid"]
    assert (status["error"] is None) == (state != "failed")
    assert state != "failed" or "No space left on device" in status["error"]


def test_a_state_that_the_worker_wrote_stands(run_dir, supervise):
    write = f"import sys; from lab_utils.runs.directory import RunDirectory as R; R({str(run_dir.path)!r})"
    supervise(f'"{sys.executable}" -c "{write}.write_status(state=\'succeeded\')"; exit 1').wait(timeout=20)
    assert run_dir.status["state"] == "succeeded" and run_dir.status["exit_code"] == 1


def test_a_rank_that_calls_itself_stopped_though_nobody_asked_has_failed(run_dir, supervise):
    write = f"import sys; from lab_utils.runs.directory import RunDirectory as R; R({str(run_dir.path)!r})"
    supervise(f'"{sys.executable}" -c "{write}.write_status(state=\'stopped\')"; exit 1').wait(timeout=20)
    assert run_dir.status["state"] == "failed"


def test_the_heartbeat_goes_on_while_the_job_lives(run_dir, supervise):
    process = supervise("sleep 60")
    until(lambda: run_dir.status.get("pid"))
    first = run_dir.status["heartbeat"]
    until(lambda: run_dir.status["heartbeat"] > first + 0.3)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)


def test_a_signal_is_passed_on_and_the_run_is_stopped(run_dir, supervise):
    process = supervise("trap 'echo heard; exit 3' TERM; while true; do sleep 0.05; done")
    until(lambda: run_dir.status.get("pid"))
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    assert run_dir.status["state"] == "stopped" and "heard" in (run_dir.logs / "launcher.log").read_text()


def test_a_job_that_hears_nothing_is_ended_with_all_its_children(run_dir, supervise):
    deaf = "trap '' TERM; (trap '' TERM; while true; do sleep 0.1; done) & while true; do sleep 0.1; done"
    process = supervise(deaf)
    until(lambda: run_dir.status.get("pid") and psutil.Process(run_dir.status["pid"]).children())
    time.sleep(1.2)  # the supervisor has seen the children
    job = psutil.Process(run_dir.status["pid"])
    family = [job, *(c for c in job.children(recursive=True) if "sleep" not in c.name())]
    run_dir.request("stop")
    process.wait(timeout=20)
    assert run_dir.status["state"] == "stopped" and len(family) == 2
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)


def test_a_hang_up_of_the_terminal_changes_nothing(run_dir, supervise):
    process = supervise("sleep 1")
    until(lambda: run_dir.status.get("pid"))
    os.kill(process.pid, signal.SIGHUP)
    process.wait(timeout=20)
    assert run_dir.status["state"] == "succeeded"
