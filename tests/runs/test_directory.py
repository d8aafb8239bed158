"""A run directory is found by what a user remembers of it, and read whole whatever its writers met."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from lab_utils.errors import LabError, RunError
from lab_utils.runs.directory import RunDirectory, all_runs, create, default_root, find, write_atomic
from lab_utils.runs.states import ACTIVE, ALLOWED, STATES, JobState, derive, transition


def make(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "recipe.yaml").write_text("name: x\n")
    return root


# -- creation ------------------------------------------------------------------------------------------


def test_a_new_run_has_its_recipe_and_a_name_that_says_when_and_what(tmp_path, recipe):
    run = create(recipe, tmp_path)
    name, day, second, digest = run.name.split("-")
    assert (name, len(day), len(second), digest) == ("trial", 8, 6, recipe.hash[:6])
    assert run.recipe == recipe and run.recipe.hash == recipe.hash
    status = run.status
    assert status["state"] == "created" and status["total_steps"] == 20 and status["step"] == 0
    assert run.control["action"] is None and run.checkpoints() == [] and run.rows("metrics.jsonl") == []


CREATE = """
import sys
from pathlib import Path
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import create
recipe = Recipe.load(sys.argv[2])
print(*(create(recipe, Path(sys.argv[1])).name for _ in range(2)))
"""


def test_launches_of_two_processes_in_the_same_second_get_folders_of_their_own(tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-c", CREATE, str(tmp_path / "runs"), str(tmp_path / "recipe.yaml")]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = [name for process in racing for name in process.communicate()[0].split()]
    assert len(names) == len(set(names)) == 4
    assert {r.name for r in all_runs(tmp_path / "runs")} == set(names)


def test_a_root_that_cannot_be_written_is_one_sentence(tmp_path, recipe):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="ASCENT_RUNS"):
        create(recipe, tmp_path / "file")


# -- finding -------------------------------------------------------------------------------------------


def test_a_run_is_found_by_name_prefix_path_and_last(tmp_path):
    older, newer = "sft-20260101-000000-aaaaaa", "dpo-20260102-000000-bbbbbb"
    root = make(tmp_path, newer, older)
    (root / "notebooks").mkdir()
    assert find(older, root).name == find("sft", root).name == older
    assert find("last", root).name == newer and [r.name for r in all_runs(root)] == [older, newer]
    assert find(str(root / older)).name == find(root / older).name == older


def test_the_name_last_means_the_newest_in_the_root_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCENT_RUNS", str(make(tmp_path, "a-20260101-000000-aaaaaa")))
    assert find("last").name == "a-20260101-000000-aaaaaa"
    monkeypatch.delenv("ASCENT_RUNS")
    assert str(default_root()) == "runs"


@pytest.mark.parametrize(
    "asked, words",
    [
        ("sft-2026", ["fits 2 runs", "sft-20260101-000000-aaaaaa", "give more of the name"]),
        ("sfd-20260101", ["There is no run 'sfd-20260101'", "nearest are", "sft-20260101-000000-aaaaaa"]),
        ("nowhere/at-all", ["no recipe.yaml", "check the path"]),
        ("", ["There is no run ''"]),
    ],
)
def test_a_run_that_is_not_found_is_answered_with_the_nearest(tmp_path, asked, words):
    root = make(
        tmp_path, "sft-20260101-000000-aaaaaa", "sft-20260102-000000-bbbbbb", "dpo-20260102-000000-cccccc"
    )
    with pytest.raises(RunError) as caught:
        find(asked, root)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_no_runs_at_all_says_how_to_start_one(tmp_path):
    with pytest.raises(RunError, match="lab run RECIPE"):
        find("last", tmp_path / "none")


def test_a_folder_without_recipe_is_no_run(tmp_path):
    with pytest.raises(LabError, match=r"recipe\.yaml"):
        _ = RunDirectory(tmp_path).recipe


# -- status --------------------------------------------------------------------------------------------


def test_a_torn_status_is_read_as_empty_and_written_over(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.status == {}
    (tmp_path / "status.json").write_text('{"state": "runn')
    assert run.status == {}
    run.write_status(state="running", step=3)
    assert run.status["step"] == 3


def test_two_writers_do_not_lose_each_others_keys(tmp_path):
    run = RunDirectory(tmp_path)

    def beat(key):
        for step in range(50):
            run.write_status(**{key: step})

    threads = [threading.Thread(target=beat, args=(key,)) for key in ("a", "b", "c")]
    seen = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        text = (tmp_path / "status.json").read_text() if (tmp_path / "status.json").exists() else "{}"
        seen.append(json.loads(text))  # never half a file
    assert {k: run.status[k] for k in "abc"} == {"a": 49, "b": 49, "c": 49} and seen
    assert sorted(p.name for p in tmp_path.iterdir()) == [".status.lock", "status.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_every_change_is_a_sign_of_life_unless_it_says_otherwise(tmp_path):
    run = RunDirectory(tmp_path)
    before = time.time()
    run.write_status(step=1)
    assert run.status["heartbeat"] >= before
    run.write_status(state="stopping", heartbeat=5.0)
    assert run.status["heartbeat"] == 5.0


def test_only_complete_checkpoints_count(tmp_path):
    for step, whole in ((20, True), (10, True), (30, False)):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "COMPLETE").touch()
    assert [p.name for p in RunDirectory(tmp_path).checkpoints()] == ["step-000010", "step-000020"]


def test_a_request_can_be_made_and_taken_back(tmp_path):
    run = RunDirectory(tmp_path)
    run.request("checkpoint_and_stop")
    assert run.control["action"] == "checkpoint_and_stop"
    run.request(None)
    assert run.control["action"] is None


# -- states --------------------------------------------------------------------------------------------


def test_every_state_is_in_the_table_of_ways_and_can_be_left_by_a_restart():
    assert set(ALLOWED) == set(STATES) and set(STATES) > ACTIVE
    for state in ("stopped", "failed", "lost"):
        assert transition(state, "queued") == "queued"


@pytest.mark.parametrize(
    "old, new", [("succeeded", "failed"), ("running", "created"), ("stopped", "succeeded"), ("x", "y")]
)
def test_impossible_ways_are_refused(old, new):
    with pytest.raises(RunError):
        transition(old, new)


def test_a_late_worker_does_not_undo_a_request_to_stop():
    assert transition("stopping", "running") == "stopping"


@pytest.mark.parametrize(
    "stored, age, job, seen",
    [
        ("running", 1, JobState.GONE, "running"),  # the job may just have ended
        ("running", 60, JobState.RUNNING, "running"),  # a long step
        ("running", 60, JobState.GONE, "lost"),
        ("queued", 60, JobState.GONE, "lost"),
        ("queued", 9999, JobState.PENDING, "queued"),
        ("running", 60, JobState.PENDING, "queued"),  # its nodes were taken, and it waits for others
        ("running", 1, JobState.PENDING, "running"),  # it has just started: the answer is older
        ("running", 60, JobState.UNKNOWN, "running"),
        ("running", 9999, JobState.UNKNOWN, "lost"),
        ("succeeded", 9999, JobState.GONE, "succeeded"),
        (None, 0, JobState.GONE, "lost"),
    ],
)
def test_lost_needs_an_old_heartbeat_and_an_unknown_job(stored, age, job, seen):
    assert derive(stored, 1e9 - age, 1e9, job) == seen
