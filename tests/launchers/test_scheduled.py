"""The supervisor of a scheduler's job and the process of a node, without a scheduler: signals, requeue, final state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in_commands import Commands

from lab_utils.launchers import _node
from lab_utils.launchers._node import numbers, visible_npus
from lab_utils.launchers._scheduled import AGAIN, ask_to_yield, ended

QUICK = """
import sys
from lab_utils.launchers import _supervisor as s, _scheduled as job
s.STOP_GRACE, s.KILL_GRACE, s.BEAT = 0.3, 1.0, 0.2
sys.exit(job.main(sys.argv[1:]))
"""
# In the place of srun and all below it: ranks that hear control.json, save, and stop.
RANKS = """
import sys, time
from lab_utils.runs.directory import RunDirectory
run = RunDirectory(sys.argv[1])
run.write_status(state="running", step=0)
for step in range(1, 200):
    time.sleep(0.05)
    if run.control["action"] and "deaf" not in sys.argv:
        run.write_status(state="stopped", step=step)
        sys.exit(0)
run.write_status(state="succeeded", step=step)
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    (tmp_path / "stand-ins").mkdir()
    found = Commands(tmp_path / "stand-ins", monkeypatch, "scontrol")
    found.answer("scontrol", "requeue 77")
    found.answer("scontrol", "show job", "JobId=77 JobState=RUNNING Restarts=0 X=1\n")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return found


@pytest.fixture
def start(run_dir, commands):
    """Start the supervisor as the script does; what is left is ended with the test."""
    started = []
    run_dir.write_status(state="queued", launcher="slurm", job="77", restarts=0)

    def begin(*words: str, command: str = RANKS, kind: str = "slurm") -> subprocess.Popen:
        own = [kind, str(run_dir.path), *(word for word in words if word.startswith("--"))]
        ranks = [
            sys.executable,
            "-c",
            command,
            str(run_dir.path),
            *(w for w in words if not w.startswith("--")),
        ]
        with (run_dir.logs / "launcher.log").open("ab") as log:
            started.append(
                subprocess.Popen([sys.executable, "-c", QUICK, *own, "--", *ranks], stdout=log, stderr=log)
            )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def kinds(run_dir) -> list[str]:
    return [event["kind"] for event in run_dir.rows("events.jsonl")]


def test_a_run_that_ends_by_itself_is_left_as_it_says(run_dir, start):
    code = "import sys; from lab_utils.runs.directory import RunDirectory; "
    code += "RunDirectory(sys.argv[1]).write_status(state='succeeded')"
    assert start(command=code).wait(timeout=30) == 0
    status = run_dir.status
    assert (
        status["state"] == "succeeded"
        and status["finished"]
        and status["job"] == "77"
        and status["pid"] is None
    )


def test_a_warning_of_slurm_becomes_a_checkpoint_and_a_place_in_the_queue(run_dir, start, commands):
    process = start()
    until(lambda: run_dir.status["state"] == "running")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert run_dir.status["state"] == "queued" and run_dir.status["restarts"] == 1
    assert commands.calls() == [["scontrol", "requeue", "77"]] and kinds(run_dir) == ["requeued"]
    assert run_dir.control == {**run_dir.control, "action": "checkpoint_and_stop", "by": "scheduler"}


def test_the_next_attempt_forgets_what_the_scheduler_had_asked(run_dir, start, monkeypatch):
    ask_to_yield(run_dir)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start()
    until(lambda: run_dir.status["state"] == "running")
    assert run_dir.control["action"] is None and run_dir.status["restarts"] == 1


def test_a_job_that_may_not_be_requeued_stops(run_dir, start, commands):
    process = start("--no-requeue")
    until(lambda: run_dir.status["state"] == "running")
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=30)
    assert run_dir.status["state"] == "stopped" and run_dir.status["finished"] and commands.calls() == []


def test_a_refused_requeue_is_said_and_the_run_has_stopped(run_dir, start, commands):
    commands.answer("scontrol", "requeue 77", code=1, err="Requested operation is presently disabled\n")
    process = start()
    until(lambda: run_dir.status["state"] == "running")
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=30)
    assert run_dir.status["state"] == "stopped" and run_dir.status["restarts"] == 0
    assert any("presently disabled" in event["message"] for event in run_dir.rows("events.jsonl"))


def test_a_stop_of_the_users_is_no_reason_to_queue_again(run_dir, start, commands):
    process = start()
    until(lambda: run_dir.status["state"] == "running")
    run_dir.request("checkpoint_and_stop")
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=30)
    assert run_dir.status["state"] == "stopped" and commands.calls() == []
    assert run_dir.control["by"] == "user"


def test_a_stop_that_was_asked_for_while_it_waited_keeps_it_from_starting(run_dir, start):
    run_dir.request("stop")
    assert start().wait(timeout=30) == 0
    assert run_dir.status["state"] == "stopped" and "started" not in run_dir.status


def test_a_job_that_slurm_requeues_itself_is_in_the_queue_before_it_is_killed(run_dir, start, commands):
    commands.answer("scontrol", "show job", "JobId=77 JobState=COMPLETING Restarts=1 X=1\n")
    process = start("deaf")
    until(lambda: run_dir.status["state"] == "running")
    process.send_signal(signal.SIGTERM)
    until(lambda: run_dir.status["state"] == "queued")
    assert run_dir.status["restarts"] == 1 and ["scontrol", "requeue", "77"] not in commands.calls()


@pytest.mark.parametrize(
    "said, state, words",
    [
        ("CANCELLED AT 2026-11-25T15:43:24 ***", "stopped", None),
        ("CANCELLED AT 2026-11-25T15:43:24 DUE TO TIME LIMIT ***", "failed", "cluster.options.hours"),
    ],
)
def test_a_job_that_slurm_ends_for_good_is_told_apart_from_a_failure(
    run_dir, start, commands, said, state, words
):
    commands.answer("scontrol", "show job", "JobId=77 JobState=COMPLETING Restarts=0 X=1\n")
    ranks = f"import sys, time; print('slurmstepd-n0: error: *** JOB 77 ON n0 {said}', flush=True); "
    ranks += "time.sleep(1); sys.exit(9)"
    process = start(command=ranks)
    until(lambda: "JOB 77" in (run_dir.logs / "launcher.log").read_text())
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert run_dir.status["state"] == state and (words is None or words in run_dir.status["error"])


def test_a_cancelled_job_whose_ranks_still_saved_is_not_queued_again(run_dir, start, commands):
    commands.answer("scontrol", "show job", "JobId=77 JobState=COMPLETING Restarts=0 X=1\n")
    process = start()
    until(lambda: run_dir.status["state"] == "running")
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert run_dir.status["state"] == "stopped" and kinds(run_dir) == ["cancelled"]
    assert ["scontrol", "requeue", "77"] not in commands.calls()


def test_a_sigterm_to_a_job_that_goes_on_is_a_warning(run_dir, start, commands):
    process = start()
    until(lambda: run_dir.status["state"] == "running")
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert run_dir.status["state"] == "queued" and ["scontrol", "requeue", "77"] in commands.calls()


def test_a_rank_that_fails_is_diagnosed_from_the_logs_of_all_nodes(run_dir, start):
    (run_dir.logs / "node-1.log").write_text("of an earlier attempt\n")
    table = (
        "Root Cause (first observed failure):\\n  time : 2026-11-24_00:01:07\\n  rank : 3 (local_rank: 1)\\n"
    )
    table += "  exitcode  : -9 (pid: 12)"
    ranks = f"open({str(run_dir.logs / 'node-1.log')!r}, 'a').write('Failures:\\n{table}\\n'); raise SystemExit(1)"
    start(command=ranks).wait(timeout=30)
    assert run_dir.status["state"] == "failed" and run_dir.status["failed_rank"] == 3
    assert "Rank 3 was killed by SIGKILL" in run_dir.status["error"]


def test_a_failure_that_looks_like_a_request_to_yield_is_a_failure(run_dir, start, commands):
    """srun ends the nodes that are left as a scheduler would; their ranks may still stop in good order."""
    code = "import sys; from lab_utils.runs.directory import RunDirectory; run = RunDirectory(sys.argv[1]); "
    code += "run.request('checkpoint_and_stop', by='scheduler'); run.write_status(state='running'); "
    code += "run.write_status(state='stopped'); sys.exit(1)"
    start(command=code).wait(timeout=30)
    assert run_dir.status["state"] == "failed" and commands.calls() == []


def test_a_pod_that_is_evicted_ends_with_the_code_to_be_started_again(run_dir, start):
    process = start(kind="pod")
    until(lambda: run_dir.status["state"] == "running")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == AGAIN
    assert run_dir.status["state"] == "queued" and run_dir.status["restarts"] == 1


def test_a_run_that_has_ended_is_not_begun_again_by_its_controller(run_dir, start):
    assert ended(run_dir) is None
    run_dir.write_status(state="failed", error="No more.", finished=1.0, exit_code=3)
    assert ended(run_dir) == 3
    assert start(kind="pod").wait(timeout=30) == 3
    assert run_dir.status["error"] == "No more."


# -- one node ------------------------------------------------------------------------------------------

TORCHRUN = """
import os, signal, sys, time
assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
print("started", os.environ.get("ASCEND_RT_VISIBLE_DEVICES"), flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(7)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_node_asks_all_ranks_to_save_and_leaves_torchrun_alone(run_dir, number):
    command = [sys.executable, "-m", "lab_utils.launchers._node", str(run_dir.path), "--"]
    with subprocess.Popen(
        [*command, sys.executable, "-c", TORCHRUN, "1.5"], stdout=subprocess.PIPE, text=True
    ) as node:
        for line in node.stdout:
            if line.startswith("started"):
                break
        node.send_signal(number)
        assert node.wait(timeout=30) == 7
    assert run_dir.control["action"] == "checkpoint_and_stop" and run_dir.control["by"] == "scheduler"


def test_a_scheduler_does_not_take_the_place_of_the_users_request(run_dir):
    run_dir.request("stop")
    ask_to_yield(run_dir)
    assert run_dir.control["action"] == "stop" and run_dir.control["by"] == "user"


@pytest.fixture
def node7(commands, tmp_path, monkeypatch):
    """A node with eight chips in a job of Slurm; its device files are empty files."""
    (tmp_path / "dev").mkdir()
    for number in range(8):
        (tmp_path / "dev" / f"davinci{number}").touch()
    (tmp_path / "dev" / "davinci_manager").touch()
    monkeypatch.setattr(_node, "DEVICES", Path(tmp_path / "dev"))
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    detail = "  Nodes=n[0-6] CPU_IDs=0 Mem=0 GRES=npu:4(IDX:0-3)\n  Nodes=n[7-8] CPU_IDs=0-3 Mem=0 GRES=npu:a3:4({})\n"
    commands.answer("scontrol", "hostnames n[0-6]", "".join(f"n{i}\n" for i in range(7)))
    commands.answer("scontrol", "hostnames n[7-8]", "n7\nn8\n")
    return lambda indices: commands.answer("scontrol", "show job -d 77", detail.format(indices))


@pytest.mark.parametrize(
    "indices, expected",
    [("IDX:4-7", "4,5,6,7"), ("IDX:0,2-3", "0,2,3"), ("IDX:0-7", None), ("CNT:4", None)],
)
def test_a_node_names_its_chips_where_it_was_given_only_some(node7, indices, expected):
    node7(indices)
    assert visible_npus() == expected


def test_chips_that_somebody_has_named_are_left(node7, monkeypatch):
    node7("IDX:4-7")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0")
    assert visible_npus() is None


def test_no_chips_are_named_where_slurm_cannot_be_asked(node7, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    assert visible_npus() is None


def test_ranges_of_numbers_are_read():
    assert numbers("0-3,6,8-9") == [0, 1, 2, 3, 6, 8, 9]
