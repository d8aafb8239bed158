"""Preflight and the checklist are the same checks: one ends at the first that fails, the other makes them all."""

import socket
import time
from types import SimpleNamespace

import pytest

from lab_utils.errors import DataError, LayoutError, RunError
from lab_utils.recipe import Recipe
from lab_utils.runs import checklist as module
from lab_utils.runs import checks
from lab_utils.runs.checklist import check_output, check_queue, checklist
from lab_utils.runs.directory import create


@pytest.fixture(autouse=True)
def data_is_fine(monkeypatch):
    monkeypatch.setattr(checks, "check_data", lambda recipe: "All there.")


def test_a_run_that_can_start_passes_each_check_and_says_what_was_found(recipe, tmp_path):
    found = checklist(recipe, tmp_path)
    assert all(check.ok and check.text.endswith(".") for check in found), found
    names = [check.name for check in found]
    assert {"layout", "devices", "weights", "disk", "output", "queue", "data"} <= set(names)
    assert "2 ranks = 2 data-parallel; a step is 1 × 2 rows on each." in found[0].text
    checks.preflight(recipe, tmp_path)


def test_all_that_is_wrong_is_listed_and_a_reason_of_several_once(recipe, tmp_path, monkeypatch):
    wrong = recipe.with_changes(
        {"cluster.nproc": 3, "model.source": "base:none", "data.train.0.manifest": "none"}
    )
    monkeypatch.undo()
    found = {check.name: check for check in checklist(wrong, tmp_path)}
    assert [name for name, check in found.items() if not check.ok] == ["layout", "weights", "data"]
    assert "model.source" in found["weights"].text and "no manifest 'none'" in found["data"].text
    with pytest.raises(LayoutError) as error:
        checks.preflight(wrong, tmp_path)
    assert str(error.value) == found["layout"].text, "the first of them, as it is"
    sampled = Recipe.load("grpo_tiny").with_changes({"cluster.nproc": 3})
    texts = [check.text for check in checklist(sampled, tmp_path) if not check.ok]
    assert len(texts) == len(set(texts)) == 1


def test_checks_that_mean_nothing_for_a_recipe_are_left_out(recipe, tmp_path):
    names = {check.name for check in checklist(recipe, tmp_path)}
    assert not names & {"rollouts", "cut"}
    cut = recipe.with_changes({"parallel.pp": 2})
    assert "cut" in [name for name, _ in module.checks_of(cut, tmp_path)]
    assert "devices" not in [
        name for name, _ in module.checks_of(recipe.with_changes({"cluster.launcher": "slurm"}), tmp_path)
    ]


def test_the_folder_of_runs_must_take_a_new_one(recipe, tmp_path):
    assert "no run of this recipe" in check_output(recipe, tmp_path / "new")
    run = create(recipe, tmp_path)
    assert f"1 run of this recipe there, the newest {run.name}" in check_output(recipe, tmp_path)
    with pytest.raises(RunError, match="lies inside a run"):
        check_output(recipe, run.path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        check_output(recipe, tmp_path / "file")


def test_other_runs_of_this_machine_are_mentioned_while_they_live(recipe, tmp_path):
    assert check_queue(recipe, tmp_path) == "No other run is active on this machine."
    run = create(recipe, tmp_path)
    run.write_status(state="running", host=socket.gethostname())
    assert f"1 other run active on this machine, the newest {run.name}" in check_queue(recipe, tmp_path)
    run.write_status(heartbeat=time.time() - 3600)
    assert "No other run" in check_queue(recipe, tmp_path)
    run.write_status(host="elsewhere")
    assert "No other run" in check_queue(recipe, tmp_path)


def test_a_launcher_has_the_word_on_its_queue(recipe, tmp_path, monkeypatch):
    def refuse(recipe):
        raise RunError("The partition is closed.")

    launcher = SimpleNamespace(queue=lambda recipe: "3 nodes idle.", check=lambda recipe, root: "Here.")
    monkeypatch.setattr(module, "get_launcher", lambda name: launcher)
    assert check_queue(recipe, tmp_path) == "3 nodes idle."
    launcher.queue = refuse
    with pytest.raises(RunError, match="closed"):
        checks.preflight(recipe, tmp_path)


@pytest.mark.parametrize(
    ("kind", "manifest", "says"),
    [
        ("sft", "ascent-tasks-preference", "objective.kind=sft learns from messages or text"),
        ("preference", "ascent-tasks-sft", "objective.kind=preference learns from preference"),
        ("sft", "ascent-tasks-sftt", "did you mean 'ascent-tasks-sft'"),
        ("sft", "ascent-tasks-text", None),
        ("grpo", "ascent-tasks-prompts", None),
    ],
)
def test_data_that_the_objective_cannot_learn_from_are_refused_before_a_start(kind, manifest, says):
    recipe = Recipe.parse({"data": {"train": [{"manifest": manifest}]}, "objective": {"kind": kind}})
    if says is None:
        checks.check_formats(recipe)
        return
    with pytest.raises(DataError, match=says):
        checks.check_formats(recipe)
