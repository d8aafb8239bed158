"""What Slurm is asked, how seldom, and how its answers are read; its commands are stand-ins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_in_commands import Commands

from lab_utils.launchers import _slurm_queue, slurm
from lab_utils.launchers._slurm_queue import Queue, duration, host_names, seconds
from lab_utils.runs.states import JobState


@pytest.fixture
def commands(tmp_path, monkeypatch):
    (tmp_path / "stand-ins").mkdir()
    found = Commands(
        tmp_path / "stand-ins", monkeypatch, "squeue", "sacct", "scontrol", "scancel", "sbatch", "sinfo"
    )
    found.answer("squeue", "", code=1, err="slurm_load_jobs error: Invalid job id specified\n")
    found.answer("sacct", "", code=1, err="Slurm accounting storage is disabled\n")
    found.answer("scontrol", "", code=1, err="slurm_load_jobs error: Invalid job id specified\n")
    return found


@pytest.fixture
def queue(monkeypatch):
    fresh = Queue()
    monkeypatch.setattr(slurm, "QUEUE", fresh)
    return fresh


def row(number, state="RUNNING", reason="None", left="1:00:00", nodes="n[0-1]", name="run"):
    return f"{number}|{state}|{reason}|{left}|main|2026-11-25T10:00:00|{nodes}|{name}\n"


def test_one_question_serves_all_runs_for_a_while(commands, queue):
    commands.answer("squeue", "--user", "".join(row(number) for number in range(100)))
    assert all(queue.job(str(number)).state == "RUNNING" for number in range(100))
    assert len(commands.calls()) == 1
    queue.forget()
    assert queue.job("7") and len(commands.calls()) == 2


def test_an_old_answer_is_asked_for_again_with_all_numbers_at_once(commands, queue, monkeypatch):
    commands.answer("squeue", "--user", row(1) + row(2))
    commands.answer("squeue", "--jobs=3", row(3, name="anothers"))
    assert [queue.job(number).name for number in ("1", "2", "3")] == ["run", "run", "anothers"]
    before = len(commands.calls())
    monkeypatch.setattr(_slurm_queue, "FRESH", 0.0)
    queue.job("1")
    asked = commands.calls()[before:]
    assert [call[0] for call in asked] == ["squeue", "squeue"] and any(
        "--jobs=3" in word for word in asked[1]
    )


def test_a_job_that_nobody_asks_for_any_more_is_not_looked_for(commands, queue, monkeypatch):
    commands.answer("squeue", "--user", row(1))
    assert queue.job("1") and queue.job("99") is None
    later = _slurm_queue.time.monotonic() + 100
    monkeypatch.setattr(_slurm_queue.time, "monotonic", lambda: later)
    before = len(commands.calls())
    queue.job("1")
    assert len(commands.calls()) == before + 1


def test_a_job_that_left_the_queue_is_looked_for_in_accounting_then_in_the_controllers_memory(
    commands, queue
):
    commands.answer("squeue", "--user", row(1))
    commands.answer("sacct", "--jobs=2", "2|CANCELLED by 1000|main|n0|run\n")
    commands.answer(
        "scontrol", "show job -o 3", "JobId=3 JobName=run JobState=COMPLETED Reason=None NodeList=n0 X=1\n"
    )
    assert queue.job("2").state == "CANCELLED" and queue.job("3").state == "COMPLETED"
    assert queue.job("4") is None, "no accounting and long forgotten: gone"


def test_a_controller_that_does_not_answer_leaves_the_state_open(commands, queue, run_dir):
    run_dir.write_status(state="running", launcher="slurm", job="1")
    commands.answer("squeue", "", code=1, err="slurm_load_jobs error: Unable to contact slurm controller\n")
    assert slurm.status(run_dir) == JobState.UNKNOWN
    assert "Unable to contact" in slurm.describe(run_dir).detail
    assert len(commands.calls()) == 1, "not asked again at once"


@pytest.mark.parametrize(
    "state, expected",
    [
        ("PENDING", JobState.PENDING),
        ("CONFIGURING", JobState.PENDING),
        ("REQUEUED", JobState.PENDING),
        ("RUNNING", JobState.RUNNING),
        ("COMPLETING", JobState.RUNNING),
        ("SUSPENDED", JobState.RUNNING),
        ("COMPLETED", JobState.GONE),
        ("NODE_FAIL", JobState.GONE),
        ("OUT_OF_MEMORY", JobState.GONE),
    ],
)
def test_states_of_slurm_are_told_as_ours(commands, queue, run_dir, state, expected):
    run_dir.write_status(state="running", launcher="slurm", job="1")
    commands.answer("squeue", "--user", row(1, state, name=run_dir.name))
    assert slurm.status(run_dir) == expected


def test_a_number_that_another_job_has_now_is_not_the_run(commands, queue, run_dir):
    run_dir.write_status(state="running", launcher="slurm", job="1")
    commands.answer("squeue", "--user", row(1, name="somebody-elses"))
    assert slurm.status(run_dir) == JobState.GONE


def test_a_waiting_job_says_where_it_stands_and_why(commands, queue, run_dir):
    run_dir.write_status(state="queued", launcher="slurm", job="5", restarts=2)
    commands.answer("squeue", "--user", row(5, "PENDING", "Priority", "UNLIMITED", "", run_dir.name))
    commands.answer("squeue", "--sort=-p,i", "3\n4\n5\n6\n")
    info = slurm.describe(run_dir)
    assert info.state == JobState.PENDING and info.position == 3 and info.restarts == 2 and info.nodes == ()
    assert info.detail == "Priority: others are before it, expected to start 11-25 10:00"
    slurm.describe(run_dir)
    assert len([call for call in commands.calls("squeue") if "--sort=-p,i" in call]) == 1


def test_a_running_job_says_its_nodes_and_the_time_that_is_left(commands, queue, run_dir):
    run_dir.write_status(state="running", launcher="slurm", job="5")
    commands.answer("squeue", "--user", row(5, left="1-02:03:04", nodes="a[08-10],b", name=run_dir.name))
    info = slurm.describe(run_dir)
    assert info.nodes == ("a08", "a09", "a10", "b") and info.seconds_left == 93784 and info.position is None


def test_a_run_whose_supervisor_wrote_its_end_is_not_asked_for(commands, queue, run_dir):
    run_dir.write_status(state="running", launcher="slurm", job="5")
    run_dir.write_status(state="succeeded", finished=1.0)
    assert slurm.status(run_dir) == JobState.GONE and commands.calls() == []


def test_a_job_that_the_notebook_itself_runs_in_is_not_handed_on(commands, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    found = _slurm_queue._environment()
    assert not {"SLURM_MEM_PER_CPU", "SQUEUE_FORMAT"} & set(found)
    assert found["SLURM_CONF"] == "/etc/slurm/slurm.conf" and found["PATH"]


def test_only_a_job_that_waits_is_cancelled_at_once(commands, queue, run_dir):
    run_dir.write_status(state="queued", launcher="slurm", job="5")
    commands.answer("scancel", "5")
    commands.answer("squeue", "--user", row(5, name=run_dir.name))
    slurm.stop(run_dir)
    assert commands.calls("scancel") == [] and run_dir.status["state"] == "stopping"
    commands.answer("squeue", "--user", row(5, "PENDING", name=run_dir.name))
    slurm.stop(run_dir)
    assert commands.calls("scancel") == [["scancel", "--state=PENDING", "5"]]
    assert run_dir.status["state"] == "stopping", (
        "it may have started in that moment: it hears the request then"
    )


@pytest.mark.parametrize(
    "text, expected",
    [("2-03:04:05", 183845.0), ("3:04:05", 11045.0), ("4:05", 245.0), ("UNLIMITED", None), ("INVALID", None)],
)
def test_times_of_slurm_are_read(text, expected):
    assert seconds(text) == expected


@given(st.floats(0.001, 1000))
def test_hours_are_written_as_slurm_reads_them(hours):
    assert abs(seconds(duration(hours)) - max(hours * 3600, 60)) <= 30


@pytest.mark.parametrize(
    "text, names",
    [
        ("n[0-1]", ("n0", "n1")),
        ("a[08-10,12],b3", ("a08", "a09", "a10", "a12", "b3")),
        ("r[1-2]-x,y", ("r1-x", "r2-x", "y")),
        ("one", ("one",)),
        ("", ()),
        ("(null)", ()),
    ],
)
def test_lists_of_nodes_are_read(text, names):
    assert host_names(text) == names
