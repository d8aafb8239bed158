"""The real thing: jobs on a Slurm of two nodes, from the call that a notebook makes to the end of the run."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import real_slurm

from lab_utils.errors import RunError
from lab_utils.launchers import _slurm_queue
from lab_utils.recipe import DataSection, DataSource, Recipe
from lab_utils.runs import checks, provenance
from lab_utils.runs.api import attach, launch
from lab_utils.runs.states import JobState

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "engine"))  # the small model of the engine's tests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster():
    try:
        real_slurm.install()
        slurm = real_slurm.Slurm()
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()
    except real_slurm.Missing as why:
        pytest.skip(str(why))


@pytest.fixture
def slurm(cluster, tmp_path, monkeypatch):
    """The cluster as a user's commands find it; nothing of another test is in the queue."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
    monkeypatch.setenv("ASCENT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(_slurm_queue, "FRESH", 0.5)
    _slurm_queue.QUEUE.forget()
    yield cluster
    cluster.ask("scancel", f"--user={os.getuid()}", check=False)
    until(lambda: not cluster.ask("squeue", "--noheader"), 60)


@pytest.fixture
def stand_in(slurm, monkeypatch):
    """Runs are trained by the stand-in for the engine's worker; the fixture sets what it does."""
    monkeypatch.setenv("ASCENT_WORKER_MODULE", "stand_in_worker")
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent / "runs"))
    monkeypatch.setattr(checks, "check_data", lambda recipe: None)
    monkeypatch.setattr(provenance, "data_hashes", lambda recipe: {})

    def behave(**options):
        monkeypatch.setenv("STAND_IN", json.dumps(options))

    behave(seconds=0.05)
    return behave


@pytest.fixture
def recipe() -> Recipe:
    """Two nodes of one rank each."""
    source = DataSource(manifest="ascent-tasks-sft")
    return Recipe.parse(
        {
            "name": "on_slurm",
            "data": DataSection(train=(source,), row_tokens=64).model_dump(),
            "schedule": {"steps": 30, "batch_tokens": 256, "warmup_steps": 0, "save_every": 10},
            "cluster": {"launcher": "slurm", "nodes": 2, "nproc": 1, "threads": 1, "accelerator": "cpu"},
            "tracking": {"wandb": "disabled"},
        }
    )


def until(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    assert found
    return found


def test_two_nodes_from_a_launch_to_the_end(slurm, stand_in, recipe):
    run = launch(recipe)
    assert run.state in ("queued", "running") and run.status["job"].isdigit()
    info = until(lambda: (job := run.job()).state == JobState.RUNNING and job)
    assert info.nodes == ("n0", "n1") and info.restarts == 0 and 0 < info.seconds_left <= 7 * 86400
    assert slurm.ask("squeue", "--noheader", "--format=%j %T").split() == [run.name, "RUNNING"]
    run.wait(timeout=300, progress=False)
    assert run.state == "succeeded" and run.status["step"] == 30 and run.status["world_size"] == 2
    assert run.job().state == JobState.GONE
    logs = run.logs()
    assert all(
        f"==> {name} <==" in logs for name in ("launcher.log", "node-0.log", "node-1.log", "rank-1.log")
    )


def test_a_job_that_waits_has_a_place_and_a_reason_and_can_be_cancelled(slurm, stand_in, recipe):
    blocker = slurm.ask(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 60"
    ).strip()
    until(lambda: slurm.ask("squeue", "--noheader", f"--jobs={blocker}", "--format=%T").strip() == "RUNNING")
    first, second = launch(recipe), launch(recipe)
    info = until(lambda: (job := second.job()).state == JobState.PENDING and job.position == 2 and job)
    assert info.detail.startswith(("Priority: others are before it", "Resources")), info
    assert first.job().position == 1 and "waits for nodes" in first.job().detail
    for run in (first, second):
        run.stop(wait=60)
        assert run.state == "stopped" and run.job().state == JobState.GONE
    assert slurm.ask("squeue", "--noheader", "--format=%i").split() == [blocker]


def test_a_running_job_is_stopped_after_a_checkpoint_and_resumed_to_its_end(slurm, stand_in, recipe):
    run = launch(recipe)
    until(lambda: run.status["step"] > 2)
    run.stop(wait=180)
    stopped = run.status
    assert stopped["state"] == "stopped" and [p.name for p in run.directory.checkpoints()] == [
        f"step-{stopped['step']:06d}"
    ]
    attach(run.path).resume()
    run.wait(timeout=300, progress=False)
    assert run.state == "succeeded" and run.status["job"] != stopped["job"]
    assert f"starts at step {stopped['step']}" in run.logs(200, rank=0)
    assert run.logs(200, rank=1).count("starts at step") == 2


def test_a_deaf_job_is_ended_by_its_supervisor(slurm, stand_in, recipe):
    stand_in(seconds=0.5, deaf=True)
    run = launch(recipe.with_changes({"schedule.steps": 1000}))
    until(lambda: run.status["step"] > 0)
    run.stop(checkpoint=False, wait=180)
    assert run.state == "stopped"


def test_a_job_cancelled_in_slurm_has_stopped(slurm, stand_in, recipe):
    stand_in(seconds=0.5)
    run = launch(recipe.with_changes({"schedule.steps": 1000}))
    until(lambda: run.status["step"] > 0)
    slurm.ask("scancel", run.status["job"])
    until(lambda: "cancelled" in kinds(run))
    assert run.state == "stopped" and "requeued" not in kinds(run)


def test_a_killed_rank_is_named_by_the_supervisor(slurm, stand_in, recipe):
    stand_in(seconds=0.5, fail={"rank": 1, "step": 3, "how": "SIGKILL"})
    run = launch(recipe.with_changes({"schedule.steps": 1000}))
    with pytest.raises(RunError, match=r"Rank 1 was killed by SIGKILL"):
        run.wait(timeout=300, progress=False)
    assert run.status["failed_rank"] == 1


def test_what_slurm_refuses_is_one_sentence(slurm, stand_in, recipe):
    with pytest.raises(RunError, match=r"no partition 'urgnt'; it has .*urgent"):
        launch(recipe.with_changes({"cluster.options.partition": "urgnt"}))
    with pytest.raises(RunError, match=r"cluster\.nodes=3, but main has 2 nodes"):
        launch(recipe.with_changes({"cluster.nodes": 3, "schedule.batch_tokens": 192}))
    with pytest.raises(RunError, match=r"hours=200, but main gives at most 168"):
        launch(recipe.with_changes({"cluster.options.hours": 200}))
    with pytest.raises(RunError, match=r"Slurm did not take the job: .*not available"):
        launch(recipe.with_changes({"cluster.options.gres": f"npu:{real_slurm.CHIPS + 1}"}))
    assert attach("last").state == "failed"


def test_chips_are_a_generic_resource_and_a_job_knows_which_it_has(slurm, stand_in, recipe):
    """Two jobs share a node's chips: the second's numbers are other ones than the first's."""
    code = (
        "import lab_utils.launchers._node as node; from pathlib import Path; "
        f"node.DEVICES = Path({str(slurm.folder / 'dev')!r}); print(node.visible_npus())"
    )
    python = f'{sys.executable} -c \\"{code}\\"'.replace('\\"', '"').replace('"', '\\"')
    outputs = []
    for chips in (2, 4, 8):
        out = slurm.folder / f"chips-{chips}.txt"
        command = f'srun bash -c "{python}"; sleep 6'
        words = ["--nodes=1", f"--gres=npu:{chips}", "--nodelist=n0", f"--output={out}", f"--wrap={command}"]
        slurm.ask("sbatch", *words)
        outputs.append(out)
    found = [until(lambda path=path: path.exists() and path.read_text().strip()) for path in outputs]
    assert found == ["0,1", "2,3,4,5", "None"], "of all chips of a node nothing need be said"


# -- taken from it, and back ---------------------------------------------------------------------------


def kinds(run) -> list[str]:
    return [event["kind"] for event in run.directory.rows("events.jsonl")]


def test_a_preempted_job_saves_queues_itself_again_and_goes_on(slurm, stand_in, recipe):
    """Slurm tells the steps of a job that is preempted with SIGTERM, and nobody else."""
    stand_in(seconds=0.2)
    run = launch(recipe)
    until(lambda: run.status["step"] > 2)
    other = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"]
    slurm.ask("sbatch", *other)
    info = until(lambda: (job := run.job()).restarts == 1 and job.state == JobState.PENDING and job)
    assert run.state == "queued" and "requeued" in kinds(run) and info.detail
    saved = int(run.directory.checkpoints()[-1].name.removeprefix("step-"))
    assert saved == run.status["step"] and saved % 10, "it was saved because it was asked for"
    run.wait(timeout=300, progress=False)
    assert run.state == "succeeded" and run.status["restarts"] == 1
    assert f"starts at step {saved}" in run.logs(200, rank=0)
    assert run.logs(200, rank=1).count("starts at step") == 2


def test_a_job_that_is_requeued_without_a_word_goes_on_from_its_last_checkpoint(slurm, stand_in, recipe):
    stand_in(seconds=0.5)  # long enough that it is still running when Slurm hears of it
    run = launch(recipe)
    until(lambda: run.directory.checkpoints())
    slurm.ask("scontrol", "requeue", run.status["job"])
    until(lambda: run.state == "queued")
    saved = int(run.directory.checkpoints()[-1].name.removeprefix("step-"))
    run.wait(timeout=300, progress=False)
    assert run.state == "succeeded" and run.status["restarts"] == 1
    begun = [int(step) for step in re.findall(r"starts at step (\d+)", run.logs(200, rank=0))]
    # Slurm's SIGTERM may leave it the time to save once more.
    assert saved >= 10 and len(begun) == 2 and begun[0] == 0 and saved <= begun[1] < 30


def test_a_job_that_may_not_be_requeued_stops_after_its_checkpoint(slurm, stand_in, recipe):
    stand_in(seconds=0.5)
    run = launch(recipe.with_changes({"cluster.options.requeue": False}))
    until(lambda: run.status["step"] > 2)
    slurm.ask("scancel", "--signal=USR1", "--batch", run.status["job"])
    run.wait(timeout=180, progress=False)
    assert run.state == "stopped" and run.directory.checkpoints() and "requeued" not in kinds(run)


def test_the_engine_taken_from_its_nodes_reaches_the_loss_of_an_undisturbed_run(slurm, recipe, tmp_path):
    """A real model on two nodes, told of its time limit on the way, against the same on this machine alone."""
    from feed_jobs import few
    from small_v4 import write_source

    real = recipe.with_changes(
        {
            "model.source": write_source(tmp_path / "source", index_topk=2),
            "data.train": [few(tmp_path, "ascent-tasks-sft", 60)],
            "data.row_tokens": 512,
            "schedule.batch_tokens": 1024,
            "schedule.steps": 30,
            "schedule.save_every": 0,
            "cluster.options.environment": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        }
    )
    here = {"cluster.launcher": "local", "cluster.nodes": 1, "cluster.nproc": 2, "cluster.options": {}}
    undisturbed = launch(real.with_changes(here)).wait(timeout=300, progress=False)
    run = launch(real)
    until(lambda: run.status["step"] >= 3)
    slurm.ask("scancel", "--signal=USR1", "--batch", run.status["job"])
    until(lambda: run.status.get("restarts") == 1)
    saved = run.status["step"]
    assert 3 <= saved < 30 and run.directory.checkpoints()[-1].name == f"step-{saved:06d}"
    run.wait(timeout=300, progress=False)
    assert run.state == "succeeded" and "resumed" in kinds(run)
    wanted, found = undisturbed.metrics()["train/loss"], run.metrics()["train/loss"]
    assert list(found.index) == list(range(1, 31))
    assert found.tolist() == wanted.tolist(), "the same bits, on one machine or two nodes, disturbed or not"
