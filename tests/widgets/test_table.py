"""The table of runs without a browser: set values, click, look at the state."""

import json
import time
from pathlib import Path

import pytest

from lab_utils.recipe import Recipe
from lab_utils.runs.api import Run
from lab_utils.runs.directory import create
from lab_utils.widgets import table
from lab_utils.widgets.table import RunTable


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load("sft_tiny")


def ended(root, recipe, losses, state="succeeded") -> Run:
    run = create(recipe, root)
    for step, loss in enumerate(losses, 1):
        run.append("metrics.jsonl", {"time": float(step), "step": step, "train/loss": loss})
    run.write_status(state="running")
    run.write_status(state=state, step=len(losses), error="out of memory" if state == "failed" else None)
    return Run(run)


@pytest.fixture
def shown(tmp_path, recipe):
    """A table over three runs; the newest is the last."""
    runs = [
        ended(tmp_path, recipe, [3.0, 2.0]),
        ended(tmp_path, recipe.with_changes({"optim.lr": 5e-4, "name": "slow"}), [3.0, 2.5, 2.4]),
        ended(tmp_path, recipe.with_changes({"name": "big"}), [3.0], state="failed"),
    ]
    return RunTable(tmp_path, follow=False), runs


def names(view: RunTable) -> list[str]:
    return [row["name"] for row in view.grid.rows]


def cell(view: RunTable, name: str, title: str) -> str:
    place = [column["title"] for column in view.grid.columns].index(title)
    return next(row["cells"][place] for row in view.grid.rows if row["name"] == name)


def test_runs_stand_newest_first_with_their_last_values(shown):
    view, runs = shown
    assert set(names(view)) == {run.name for run in runs}
    stamps = [name[-22:-7] for name in names(view)]
    assert stamps == sorted(stamps, reverse=True)
    assert cell(view, runs[1].name, "loss") == "2.4" and cell(view, runs[0].name, "step") == "2"
    assert cell(view, runs[2].name, "state") == "failed"
    titles = [column["title"] for column in view.grid.columns]
    assert "MFU %" not in titles and "reward" not in titles, "what no run has is no column"


def test_a_filter_looks_in_names_states_tags_and_errors(shown):
    view, runs = shown
    view.search.value = "SLOW"
    assert names(view) == [runs[1].name] and "1 of 3" in view.count.value
    view.search.value = "failed memory"
    assert names(view) == [runs[2].name]
    view.search.value = "nothing like it"
    assert names(view) == [] and "No run fits" in view.grid.waiting


def test_what_can_be_done_follows_what_is_chosen(shown):
    view, runs = shown
    assert view.compare.disabled and view.delete.disabled and view.fork.disabled
    view.grid.chosen = [runs[0].name]
    assert view.compare.disabled and not view.delete.disabled and not view.fork.disabled
    view.grid.chosen = [runs[0].name, runs[1].name]
    assert not view.compare.disabled and view.fork.disabled
    assert [run.name for run in view.chosen] == [runs[0].name, runs[1].name]


def test_two_runs_compared_show_their_curves_and_only_what_differs(shown):
    view, runs = shown
    view.grid.chosen = [runs[0].name, runs[1].name]
    view.compare.click()
    curves, words = view.below.children
    assert "optim.lr" in words.value and "0.0005" in words.value and "data.row_tokens" not in words.value
    assert [each["label"] for each in curves.tables] == [runs[0].name, runs[1].name]
    assert "train/loss" in curves.columns and curves.panels[0]["title"] == "Alignment loss"
    assert view.status.value == ""


def test_too_many_runs_are_refused_with_a_sentence(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(table, "MOST", 2)
    runs = [ended(tmp_path, recipe.with_changes({"seed": seed}), [1.0]) for seed in range(3)]
    view = RunTable(tmp_path, follow=False)
    view.grid.chosen = [run.name for run in runs]
    view.compare.click()
    assert "choose fewer" in view.status.value and not view.below.children


def test_delete_asks_once_and_can_be_taken_back(shown):
    view, runs = shown
    view.grid.chosen = [runs[2].name]
    view.delete.click()
    assert runs[2].path.exists() and "no way back" in view.status.value
    view.keep.click()
    view.delete.click()
    assert runs[2].path.exists(), "it asks again"
    view.delete.click()
    assert not runs[2].path.exists() and runs[2].name not in names(view) and view.grid.chosen == []


def test_a_choice_that_changes_takes_a_begun_deletion_back(shown):
    view, runs = shown
    view.grid.chosen = [runs[2].name]
    view.delete.click()
    view.grid.chosen = [runs[0].name]
    view.delete.click()
    assert all(run.path.exists() for run in runs)


def test_a_run_that_goes_on_is_not_deleted(tmp_path, recipe):
    run = create(recipe, tmp_path)
    run.write_status(state="queued", launcher="local")
    view = RunTable(tmp_path, follow=False)
    view.grid.chosen = [run.name]
    view.delete.click()
    view.delete.click()
    assert run.path.exists() and "stop it first" in view.status.value


def test_tags_and_notes_are_written_to_what_is_chosen(shown):
    view, runs = shown
    view.grid.chosen = [runs[0].name]
    view.tags.value, view.note.value = "baseline, v1", "as it should be"
    view.write.click()
    assert runs[0].tags == ("baseline", "v1") and runs[0].notes == "as it should be"
    assert cell(view, runs[0].name, "tags") == "baseline v1"
    view.tags.value = "two words"
    view.write.click()
    assert runs[0].tags == ("two", "words")
    view.tags.value = "<b>"
    view.write.click()
    assert "no tag" in view.status.value and runs[0].tags == ("two", "words")


def test_a_fork_is_a_form_with_the_recipe_of_the_run(shown):
    view, runs = shown
    view.grid.chosen = [runs[1].name]
    view.fork.click()
    assert view.form.recipe == runs[1].recipe and len(view.below.children) == 1


def test_a_damaged_run_is_shown_with_what_is_wrong(shown, tmp_path):
    view, runs = shown
    (runs[0].path / "recipe.yaml").write_text("{")
    (runs[1].path / "status.json").write_text(json.dumps({"state": 7}))
    view.look()
    assert cell(view, runs[0].name, "state") == "damaged" and "YAML" in cell(view, runs[0].name, "note")
    assert len(names(view)) == 3
    view.grid.chosen = [runs[0].name, runs[2].name]
    view.compare.click()
    assert "YAML" in view.status.value


def test_without_anybody_to_click_it_is_a_plain_table(shown, monkeypatch):
    view, runs = shown
    monkeypatch.setenv("ASCENT_HEADLESS", "1")
    page = view._repr_mimebundle_()["text/html"]
    assert all(run.name in page for run in runs)


# -- as it follows the folder ------------------------------------------------------------------------------------------


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


@pytest.fixture
def followed(tmp_path, monkeypatch):
    """A table that looks by itself."""
    monkeypatch.setenv("ASCENT_HEADLESS", "0")
    monkeypatch.setattr(table, "EVERY", 0.02)
    views = []

    def make():
        views.append(RunTable(tmp_path))
        return views[-1]

    yield make
    for view in views:
        view.close()


def test_runs_of_others_appear_by_themselves(followed, tmp_path, recipe):
    view = followed()
    assert names(view) == [] and "There are no runs" in view.grid.waiting
    run = ended(tmp_path, recipe, [2.0])
    until(lambda: names(view) == [run.name])


def test_a_slow_folder_or_scheduler_keeps_neither_the_cell_nor_the_timer_waiting(followed, monkeypatch):
    monkeypatch.setattr(table, "PATIENCE", 0.05)
    monkeypatch.setattr(table.Overview, "rows", lambda self: time.sleep(1.0) or [])
    began = time.monotonic()
    view = followed()
    view._beat()
    assert time.monotonic() - began < 0.9 and "Reading the runs" in view.grid.waiting
    until(lambda: "There are no runs" in view.grid.waiting)


def test_a_table_that_was_cleared_from_its_page_reads_nothing(followed, tmp_path, recipe):
    view = followed()
    view.grid.watched = 0
    time.sleep(0.1)
    looks = view._looks
    time.sleep(0.1)
    assert view._looks == looks
    view.grid.watched = 1
    until(lambda: view._looks > looks)


def test_an_answer_from_before_brings_no_deleted_run_back(shown):
    view, runs = shown
    before = view._read()
    runs[0].delete()
    view.look()
    view._bring(before)
    assert runs[0].name not in names(view)


def test_a_folder_that_lets_nobody_in_is_a_row_that_says_so(tmp_path, recipe, monkeypatch):
    run = ended(tmp_path, recipe, [2.0])
    real = Path.stat

    def stat(self, **options):
        if self.parent == run.path:
            raise PermissionError(13, "Permission denied")
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    view = RunTable(tmp_path, follow=False)
    assert cell(view, run.name, "state") == "damaged" and "Permission denied" in view.rows[0].error
