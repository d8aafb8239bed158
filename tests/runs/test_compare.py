"""Runs beside one another, what people write at them, and the table of a folder that several people use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab_utils.errors import RunError
from lab_utils.runs import notes
from lab_utils.runs.api import Run
from lab_utils.runs.compare import compare, curves, recipe_diff
from lab_utils.runs.directory import RunDirectory, create
from lab_utils.runs.overview import Overview


def made(root: Path, recipe, losses=(), **status) -> Run:
    run = create(recipe, root)
    for step, loss in enumerate(losses, 1):
        run.append(
            "metrics.jsonl", {"time": 1.0, "step": step, "train/loss": loss, "perf/tokens_per_s": 10.0}
        )
    if status:
        run.write_status(state="running")
        run.write_status(**status)
    return Run(run)


def test_only_what_differs_is_a_difference(recipe):
    other = recipe.with_changes({"optim.lr": 5e-4, "data.row_tokens": 32})
    assert recipe_diff(recipe, recipe) == []
    assert recipe_diff(recipe, other) == [("data.row_tokens", 64, 32), ("optim.lr", 1e-3, 5e-4)]


def test_a_key_that_one_recipe_lacks_is_none_there(recipe):
    other = recipe.with_changes({"objective": {"kind": "reward"}})
    found = {key: (a, b) for key, a, b in recipe_diff(recipe, other)}
    assert found["objective.kind"] == ("sft", "reward") and found["objective.margin"] == (None, 0.0)


def test_runs_compared_have_settings_that_differ_and_last_values(tmp_path, recipe):
    a = made(tmp_path, recipe, [3.0, 2.0])
    b = made(tmp_path, recipe.with_changes({"optim.lr": 5e-4}), [3.0, 2.5, 1.5])
    (b.path / "report.json").write_text(
        json.dumps({"exact_match": {"value": 0.75}, "base": {"exact_match": {"value": 0.5}}})
    )
    frame = compare([a, b])
    assert frame.loc[a.name, "optim.lr"] == 1e-3 and frame.loc[b.name, "optim.lr"] == 5e-4
    assert frame.loc[a.name, "train/loss"] == 2.0 and frame.loc[b.name, "train/loss"] == 1.5
    assert frame.loc[b.name, "exact match"] == 0.75 and frame.loc[b.name, "exact match before"] == 0.5
    assert "data.row_tokens" not in frame and "eval/loss" not in frame
    lines = curves([a, b], "train/loss")
    assert lines[b.name].tolist() == [3.0, 2.5, 1.5] and lines[a.name].dropna().tolist() == [3.0, 2.0]


def test_notes_and_tags_stay_and_what_is_not_given_stays_too(tmp_path, recipe):
    run = made(tmp_path, recipe)
    assert run.notes == "" and run.tags == ()
    run.notes = "  the rate was too high "
    run.tags = "baseline, v2 baseline"
    assert run.notes == "the rate was too high" and run.tags == ("baseline", "v2")
    run.tags = ["v3"]
    assert run.notes == "the rate was too high" and run.tags == ("v3",)
    with pytest.raises(RunError, match="no tag"):
        run.tags = ["two words"]
    (run.path / notes.FILE).write_text("{broken")
    assert run.tags == ()


def test_a_fork_is_the_recipe_with_changes_and_may_start_from_the_weights(tmp_path, recipe):
    run = made(tmp_path, recipe)
    assert run.fork() == recipe and run.fork({"optim.lr": 0.1}).optim.lr == 0.1
    with pytest.raises(RunError, match="no checkpoint"):
        run.fork(weights=True)
    folder = run.path / "checkpoints" / "step-000010"
    folder.mkdir(parents=True)
    (folder / "COMPLETE").touch()
    assert run.fork(weights=True).model.source == str(folder / "model")


def test_a_run_that_goes_on_is_not_deleted_and_one_that_has_ended_is(tmp_path, recipe, monkeypatch):
    run = made(tmp_path, recipe, state="running")
    monkeypatch.setattr("lab_utils.launchers.local.status", lambda directory: "running")
    with pytest.raises(RunError, match="stop it first"):
        run.delete()
    run.directory.write_status(state="failed", error="x")
    run.delete()
    assert not run.path.exists() and list(tmp_path.iterdir()) == []


def test_a_damaged_run_is_a_row_that_says_so(tmp_path, recipe):
    good = made(tmp_path, recipe, [2.0], state="succeeded")
    bad = made(tmp_path, recipe)
    (bad.path / "recipe.yaml").write_text("optim: {lr: fast}\n")
    gone = made(tmp_path, recipe)
    (gone.path / "recipe.yaml").unlink()
    (tmp_path / "notebooks").mkdir()
    rows = {row.name: row for row in Overview(tmp_path).rows()}
    assert set(rows) == {good.name, bad.name, gone.name}
    assert rows[good.name].state == "succeeded" and rows[good.name].metrics["train/loss"] == 2.0
    assert rows[bad.name].state == rows[gone.name].state == "damaged"
    assert "'data' is missing" in rows[bad.name].error and "no recipe.yaml" in rows[gone.name].error


def test_rows_follow_the_files(tmp_path, recipe):
    overview = Overview(tmp_path)
    assert overview.rows() == []
    run = made(tmp_path, recipe, [2.0], state="succeeded")
    (row,) = overview.rows()
    assert row.metrics["train/loss"] == 2.0 and row.tags == ()
    run.directory.append("metrics.jsonl", {"time": 2.0, "step": 2, "train/loss": 1.25})
    run.tags = ["kept"]
    (row,) = overview.rows()
    assert row.metrics["train/loss"] == 1.25 and row.tags == ("kept",) and "kept" in row.words
    assert row.owner
    run.delete()
    assert overview.rows() == []


LAUNCH = """
import sys
from lab_utils import Recipe, launch
for _ in range(4):
    print(launch(Recipe.load(sys.argv[1])).wait(progress=False).path)
"""


@pytest.mark.slow
def test_two_people_in_one_folder_overwrite_nothing(tmp_path, recipe, stand_in):
    stand_in(seconds=0.001)
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.with_changes({"cluster.nproc": 1}).to_yaml())
    people = [
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(path)],
            env={**os.environ, "USER": name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("ada", "bert")
    ]
    said = []
    for person in people:
        out, errors = person.communicate(timeout=400)
        assert person.returncode == 0, errors[-2000:]
        said += out.split()
    assert len(set(said)) == 8
    rows = Overview().rows()
    assert {str(row.path) for row in rows} == set(said)
    assert {row.state for row in rows} == {"succeeded"} and all(row.step == 20 for row in rows)
    for row in rows:
        assert list(Run(RunDirectory(row.path)).metrics().index) == list(range(1, 21))
