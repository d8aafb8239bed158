"""The launch form as a person uses it: state and buttons, no browser. What a process answers is stood in for."""

import html
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import ipywidgets
import nbformat
import pytest

from lab_utils import LaunchForm, Recipe
from lab_utils.errors import LabError, RecipeError, RunError
from lab_utils.panels.notebooks import NOTEBOOKS
from lab_utils.recipe import parse_changes
from lab_utils.runs.api import attach
from lab_utils.runs.directory import create
from lab_utils.widgets import _away, _job, _pages, _questions
from lab_utils.widgets._place import headless
from lab_utils.widgets.form import NotLaunched

ESTIMATE = {
    "parameters": 1000,
    "tokens_per_step": 4096,
    "steps": 500,
    "ranks": 2,
    "flops_per_step": 1e9,
    "weights_gib": 2.0,
    "gradients_gib": 4.0,
    "optimizer_gib": 6.0,
    "host_gib": 0.0,
    "device": "npu",
    "device_gib": 64.0,
    "utilisation": 0.35,
    "step_seconds": 2.0,
    "total_seconds": 1000.0,
    "device_hours": 0.5556,
    "state_gib": 12.0,
    "fits": True,
}


class StandInAway:
    """In place of the process beside the kernel: answers from a table, and remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self.answers = {
            "plan": {"estimate": ESTIMATE, "knobs": []},
            "looks": [],
            "rows": {"name": "a:train", "format": "messages", "total": 9, "rows": []},
            "checks": [
                {"name": "disk", "ok": False, "text": "No <room>."},
                {"name": "data", "ok": True, "text": "Fine."},
            ],
        }

    def ask(self, question, recipe, **arguments):
        self.asked.append((question, recipe, arguments))
        answer = self.answers[question]
        if callable(answer):
            answer = answer(recipe, **arguments)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def interrupt(self):
        pass


class StandInView:
    """In place of the live view of a run."""

    def __init__(self, run):
        self.run, self.widget, self.open = run, ipywidgets.HTML(run.name), True

    def close(self):
        self.open = False


@pytest.fixture
def away(monkeypatch, tmp_path):
    """A form in front of a person, over folders of the test."""
    found = StandInAway()
    found.answers["start"] = lambda recipe, root: str(create(recipe, root).path)
    monkeypatch.setattr(_job, "Away", lambda: found)
    monkeypatch.setattr(_pages, "Away", lambda: found)
    monkeypatch.setitem(sys.modules, "lab_utils.widgets.live", SimpleNamespace(LiveView=StandInView))
    monkeypatch.setenv("ASCENT_HEADLESS", "0")
    monkeypatch.setenv("ASCENT_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def form(away) -> LaunchForm:
    return LaunchForm("sft_tiny")


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.01)


def said(form) -> str:
    return html.unescape(re.sub("<[^>]*>", "", form.view.status.value))


def shown(form, title) -> str:
    page = form.view.pages.pages[title]
    return html.unescape(re.sub("<[^>]*>", " ", page.note.value + page.html.value))


def press_launch(form):
    form.view.launch.click()
    form.view.job.settle()


# -- fields --------------------------------------------------------------------------------------------


def test_a_mistyped_value_says_so_under_its_field_and_launch_waits(form):
    form.field("optim.lr").value = "fast"
    row = form.view.row("optim.lr")
    assert "valid number" in row.help.value and "lab-wrong" in row.input._dom_classes
    assert form.view.launch.disabled and said(form).startswith("optim.lr: ")
    with pytest.raises(RecipeError, match="valid number"):
        _ = form.recipe
    form.field("optim.lr").value = "3e-3"
    assert form.recipe.optim.lr == 3e-3 and not form.view.launch.disabled
    assert "Peak learning rate" in row.help.value and "lab-wrong" not in row.input._dom_classes
    assert "lab-changed" in row.label._dom_classes and "1 change to sft_tiny" in said(form)


def test_only_what_is_looked_at_has_widgets(form):
    view = form.view
    assert all(not box.children for box in view._sections.values()) and view.essentials.children
    titles = list(view.accordion.titles)
    view.accordion.selected_index = titles.index("Optimizer")
    inputs = view._sections["optim"].children[1::3]
    assert [type(each).__name__ for each in inputs[:2]] == ["Dropdown", "Textarea"]
    assert not view._sections["model"].children


def test_kinds_of_values_get_the_widgets_that_fit(form):
    kinds = {
        "model.dtype": ipywidgets.Dropdown,
        "data.drop_thinking": ipywidgets.Checkbox,
        "data.train": ipywidgets.Textarea,
        "optim.lr": ipywidgets.Text,
        "cluster.launcher": ipywidgets.Dropdown,
        "parallel.dp": ipywidgets.Text,
    }
    assert all(type(form.field(key)) is kind for key, kind in kinds.items())
    assert "slurm" in [value for _, value in form.field("cluster.launcher").options]
    assert form.field("parallel.dp").placeholder == "absent"
    assert form.field("schedule.steps").placeholder == "100"


def test_another_kind_of_objective_changes_the_fields(form):
    with pytest.raises(RecipeError, match=r"no field 'objective\.beta'"):
        form.field("objective.beta")
    assert "Rollout" not in form.view.accordion.titles
    form.field("objective.kind").value = "grpo"
    assert any(title.startswith("Rollout") for title in form.view.accordion.titles)
    form.field("objective.kind").value = "preference"
    assert "kto" in [value for _, value in form.field("objective.loss").options]
    form.field("objective.beta").value = "0.2"
    assert form.recipe.objective.beta == 0.2


def test_a_section_with_a_mistake_is_marked_and_opened_once(form):
    form.field("objective.kind").value = "preference"
    form.field("objective.target_margin").value = "1"
    titles = list(form.view.accordion.titles)
    wrong = next(index for index, title in enumerate(titles) if title.startswith("⚠ Objective"))
    assert form.view.accordion.selected_index == wrong
    form.view.accordion.selected_index = None
    assert form.view.accordion.selected_index is None, "a person may look elsewhere"


def test_a_form_over_a_changed_recipe_counts_its_changes_from_the_named_one(away):
    recipe = Recipe.load("sft_tiny").with_changes({"schedule.steps": 50})
    assert LaunchForm(recipe).recipe == recipe
    assert "1 change to sft_tiny" in said(LaunchForm(recipe))
    assert LaunchForm("sft_tiny", changes={"schedule.steps": 50}).recipe.hash == recipe.hash
    with pytest.raises(RecipeError, match="did you mean 'sft_tiny'"):
        LaunchForm("sft_tin")


def test_a_handler_never_raises(form, monkeypatch):
    monkeypatch.setattr(form.view._sheet, "write", lambda *_: 1 / 0)
    form.field("optim.lr").value = "1"
    assert said(form).startswith("ZeroDivisionError")
    form.view.load_file.click()
    assert said(form) == "Give the path of a YAML file to load."


# -- recipes and files ---------------------------------------------------------------------------------


def test_recipes_are_found_by_name_and_by_what_they_do(form, tmp_path):
    (tmp_path / "mine.yaml").write_text("# My own trial\n" + Recipe.load("grpo_tiny").to_yaml())
    (tmp_path / "other.yaml").write_text("services: {}\n")
    picker = form.view.picker
    picker.search.value = "verifier grpo"
    assert [value for _, value in picker.list.options] == ["grpo_tiny"]
    assert picker.list.value is None and form.recipe.name == "sft_tiny", "a search picks nothing"
    picker.search.value = "own trial"
    assert [value for _, value in picker.list.options] == ["mine.yaml"]
    picker.list.value = "mine.yaml"
    assert form.recipe == Recipe.load("grpo_tiny") and said(form).startswith("mine.yaml · hash")


def test_picking_another_recipe_can_be_taken_back(form):
    form.field("optim.lr").value = "5e-4"
    form.view.picker.list.value = "preference_tiny"
    assert form.recipe == Recipe.load("preference_tiny")
    form.view.undo.click()
    assert form.recipe == Recipe.load("sft_tiny").with_changes({"optim.lr": 5e-4})
    assert form.field("optim.lr").value == "5e-4" and form.view.undo.disabled
    assert form.view.picker.list.value == "sft_tiny"


def test_saving_does_not_overwrite_unasked_and_loads_back(form, tmp_path):
    view = form.view
    form.field("optim.lr").value = "5e-4"
    view.path.value = "trial"
    view.save.click()
    assert Recipe.load(tmp_path / "trial.yaml") == form.recipe and "trial.yaml" in said(form)
    form.field("optim.lr").value = "6e-4"
    view.save.click()
    assert "there already" in said(form) and Recipe.load(tmp_path / "trial.yaml").optim.lr == 5e-4
    view.path.value = "trial.yaml"
    assert view.save.description == "Save as"
    view.save.click()
    view.save.click()
    assert Recipe.load(tmp_path / "trial.yaml").optim.lr == 6e-4
    form.field("optim.lr").value = "7e-4"
    view.load_file.click()
    assert form.recipe.optim.lr == 6e-4
    view.path.value = "none/there.yaml"
    view.save.click()
    assert "cannot be written" in said(form)
    view.load_file.click()
    assert "no such recipe file" in said(form)


# -- beside the form -----------------------------------------------------------------------------------


def test_the_plan_says_what_it_costs_and_whether_it_fits(form, away):
    until(lambda: form.view and "It fits" in shown(form, "Plan"))
    text = shown(form, "Plan")
    assert "12 GiB of 64 GiB" in text and "0.556 device-hours on 2 × npu" in text and "17 min" in text
    away.answers["plan"] = {
        "estimate": ESTIMATE | {"fits": False, "device_gib": 8.0},
        "knobs": ["parallel.zero=1 would do."],
    }
    form.field("optim.lr").value = "1e-4"
    until(
        lambda: "does not fit" in shown(form, "Plan") and "parallel.zero=1 would do." in shown(form, "Plan")
    )


PLANNED = {
    "name": "dp4 ep2 pp2 <full>",
    "cluster": "ascend-910c",
    "fits": True,
    "why": "",
    "memory_gib": {"weights": 20.0, "gradients": 22.5, "slack": 1.5, "masters": 0.0},
    "memory_peak_gib": 44.0,
    "memory_stage": 1,
    "room_gib": 64.0,
    "step_s": 20.0,
    "step_terms_s": {"matrix products": 15.0, "pipeline bubble": 5.0},
    "tokens_per_s": 1234.0,
    "mfu": 0.311,
    "mfu_denominator_tflops": 376.0,
    "binding": "pipeline bubble, 25 % of the step",
    "chips": 4.0,
    "steps": 500,
    "tokens_per_step": 4096,
    "advice": ["parallel.pp=1: faster.", "parallel.ep=4: slower."],
}


def test_for_other_chips_the_planner_counts_and_its_layout_goes_into_the_form(form, away):
    away.answers["planned"] = PLANNED
    away.answers["layout"] = {
        "parallel": {"ep": 2, "pp": 2},
        "schedule.micro_rows": 1,
        "model.checkpointing": "full",
    }
    view = form.view
    assert view.pages.chosen.name == "" and view.pages.chosen.search.disabled
    form.field("cluster.accelerator").value = "npu"
    assert view.pages.chosen.name == "ascend-910c", "of npu the usual one"
    until(lambda: "44 GiB of 64 GiB" in shown(form, "Plan"))
    text = shown(form, "Plan")
    assert "gradients 22.5 GiB, weights 20 GiB" in text and "masters" not in text
    assert (
        "matrix products 75 %" in text and "31.1 % of 376 TFLOPS" in text and "parallel.pp=1: faster." in text
    )
    assert "11.1 chip-hours on 4 chips" in text and "pp2 <full> on" in text
    batch = form.field("schedule.batch_tokens").value
    view.pages.chosen.search.click()
    until(lambda: form.recipe.parallel.pp == 2)
    assert form.recipe.parallel.ep == 2 and form.recipe.model.checkpointing == "full"
    assert form.field("schedule.batch_tokens").value == batch and not view.pages.chosen.search.disabled
    assert "parallel.ep" in [key for key, _, _ in view._sheet.changes()], "counted from the same recipe"
    view.undo.click()
    assert form.recipe.parallel.pp == 1


def test_a_search_that_finds_nothing_says_so_and_changes_nothing(form, away):
    away.answers["planned"] = PLANNED | {"fits": False, "why": "It needs 99 GiB."}
    away.answers["layout"] = LabError("Nothing fits 64 GiB.")
    form.view.pages.chosen.choice.value = "ascend-910b"
    until(lambda: "It needs 99 GiB." in shown(form, "Plan"))
    before = form.recipe
    form.view.pages.chosen.search.click()
    until(lambda: "Nothing fits 64 GiB." in form.view.pages.pages["Plan"].note.value)
    assert form.recipe == before
    form.field("cluster.accelerator").value = "cuda"
    assert form.view.pages.chosen.name == "ascend-910b", "a person's choice stays"


def test_the_planner_answers_a_form_in_the_process_beside_the_kernel():
    recipe = Recipe.load("v4_pro_sft")
    found = _questions.planned(recipe, "ascend-910c")
    assert found["fits"] and found["chips"] == 1024 and found["advice"]
    assert sum(found["step_terms_s"].values()) == pytest.approx(found["step_s"], abs=0.02)
    none = _questions.planned(recipe.with_changes({"model.checkpointing": "none"}), "ascend-910c")
    assert not none["fits"] and "GiB" in none["why"]
    assert none["advice"][0].startswith("model.checkpointing=full"), "what makes it fit comes first"
    changes = _questions.layout(recipe, "ascend-910c")
    best = _questions.planned(recipe.with_changes(changes), "ascend-910c")
    assert best["fits"] and best["step_s"] <= found["step_s"]
    assert _questions.planned(recipe.with_changes({"parallel": "auto"}), "ascend-910c") == best
    with pytest.raises(LabError, match="Nothing fits"):
        _questions.layout(
            recipe.with_changes({"cluster.nodes": 8, "schedule.batch_tokens": 1024 * 4096}), "ascend-910c"
        )


def test_a_plan_is_asked_for_once_a_recipe_and_not_for_what_is_no_recipe(form, away):
    until(lambda: form.view and "It fits" in shown(form, "Plan"))
    form.field("optim.lr").value = "1e-"
    form.field("optim.lr").value = "1e-3"
    form.field("optim.lr").value = "0.002"
    form.field("tracking.project").value = "other"
    until(lambda: "It fits" in shown(form, "Plan"))
    time.sleep(0.5)
    assert len([each for each in away.asked if each[0] == "plan"]) == 1


def test_what_a_launch_would_refuse_is_shown_at_its_field_and_holds_launch_back(form, away):
    refusal = ["data.train", "There is no manifest 'nope'."]
    away.answers["looks"] = lambda recipe: [refusal] if "nope" in str(recipe.data) else []
    form.field("data.train").value = "- manifest: nope"
    until(lambda: form.view.launch.disabled)
    assert "no manifest 'nope'" in html.unescape(form.view.row("data.train").help.value)
    form.field("tracking.project").value = "other"
    assert form.view.launch.disabled, "another change doesn't make it right"
    form.field("data.train").value = "- manifest: ascent-tasks-sft"
    assert not form.view.launch.disabled


def test_pages_are_made_when_they_are_opened(form, away):
    form.field("optim.lr").value = "1e-3"
    pages = form.view.pages
    assert not any(each[0] in ("rows", "checks") for each in away.asked)
    pages.open("Changes")
    until(lambda: "optim.lr" in shown(form, "Changes"))
    assert "0.002  →  0.001" in shown(form, "Changes")
    pages.open("Preflight")
    until(lambda: "1 of 2 checks" in shown(form, "Preflight"))
    assert "No <room>." in shown(form, "Preflight")
    away.answers["checks"] = [{"name": "disk", "ok": True, "text": "Room."}]
    pages.again.click()
    until(lambda: "Nothing keeps the run" in shown(form, "Preflight"))


def test_the_script_is_the_launchers_and_nothing_is_written_for_it(form, tmp_path):
    form.view.pages.open("Script")
    until(lambda: "torch.distributed.run" in shown(form, "Script"))
    assert "--nproc-per-node 2" in shown(form, "Script")
    form.field("cluster.launcher").value = "slurm"
    form.field("cluster.options.partition").value = "910c"
    until(lambda: "910c" in shown(form, "Script"))
    assert "#SBATCH" in shown(form, "Script") and not (tmp_path / "runs").exists()


def test_rows_are_chat_with_what_bears_loss_coloured(form, away):
    parts = {"chosen": [["<b>2+3?", False, False], ["5", True, False]], "rejected": [["6", True, False]]}
    row = {"place": "x line 1", "tokens": 7, "with_loss": 2, "parts": parts}
    away.answers["rows"] = {"name": "a:train", "format": "preference", "total": 9, "rows": [row]}
    form.view.pages.open("Data")
    until(lambda: "2+3?" in shown(form, "Data"))
    assert "row 1 of 9 · 7 tokens, 2 bear loss" in shown(form, "Data")
    page = form.view.pages.pages["Data"].html.value
    assert "&lt;b&gt;2+3?" in page and re.search(r'<span style="background[^>]*>5</span>', page)
    assert form.view.pages.source.value == ("train", 0)
    form.view.pages.on.click()
    until(lambda: [each[2].get("start") for each in away.asked if each[0] == "rows"][-1] == 4)
    form.view.pages.source.value = ("validation", 0)
    until(lambda: [each[2] for each in away.asked if each[0] == "rows"][-1]["part"] == "validation")
    assert [each[2] for each in away.asked if each[0] == "rows"][-1]["start"] == 1


def test_a_page_that_fails_is_one_sentence_on_it(form, away):
    away.answers["rows"] = RunError("The disk is away.")
    form.view.pages.open("Data")
    until(lambda: "The disk is away." in shown(form, "Data"))


def test_a_late_answer_does_not_replace_a_later_one():
    found, gate = [], []
    latest = _away.Latest(found.append, threading.RLock())
    latest.ask(lambda: (until(lambda: gate), "old")[1])
    latest.ask(lambda: "new")
    until(lambda: found)
    gate.append(True)
    time.sleep(0.1)
    assert found == ["new"]


# -- launching -----------------------------------------------------------------------------------------


def test_launch_starts_the_recipe_of_the_form_and_shows_the_run(form, away):
    with pytest.raises(NotLaunched, match="Press Launch above") as stopped:
        form.launched()
    assert stopped.value._render_traceback_() == [str(stopped.value)], "no traceback in the notebook"
    form.field("schedule.steps").value = "7"
    press_launch(form)
    run = form.launched()
    assert run.recipe == form.recipe and run.recipe.schedule.steps == 7
    assert run.name in said(form) and form.view.below.children[0].value == run.name
    assert run.path.parent == form.root and not form.view.launch.disabled
    assert [each[0] for each in away.asked].count("start") == 1
    first = form.view.live
    form.field("schedule.steps").value = "8"
    press_launch(form)
    assert form.launched().recipe.schedule.steps == 8 and not first.open and form.view.live.open


def test_a_launch_that_is_refused_is_one_sentence(form, away):
    away.answers["start"] = LabError("Full.")
    press_launch(form)
    assert said(form) == "Full." and form.run is None and not form.view.launch.disabled
    with pytest.raises(NotLaunched, match=r"Full\."):
        form.launched()


def test_a_second_press_while_launching_launches_nothing(form, away):
    gate = []
    start = away.answers["start"]
    away.answers["start"] = lambda recipe, root: (until(lambda: gate), start(recipe, root))[1]
    form.view.launch.click()
    assert form.view.launch.disabled
    form.view.launch.click()
    gate.append(True)
    assert form.launched().recipe == form.recipe, "waits for the launch under way"
    assert [each[0] for each in away.asked].count("start") == 1


def test_without_a_person_the_recipe_is_launched_once_and_no_widget_is_made(monkeypatch, tmp_path):
    from lab_utils.runs import api

    monkeypatch.setenv("ASCENT_HEADLESS", "1")
    monkeypatch.setattr(api, "launch", lambda recipe, root: api.Run(create(recipe, root)))
    form = LaunchForm("sft_tiny", {"schedule.steps": 3}, root=tmp_path)
    assert form._repr_mimebundle_() == {"text/plain": f"{form!r}\nschedule.steps: 500 → 3"}
    assert form.recipe.hash[:12] in repr(form)
    run = form.launched()
    assert run.recipe == form.recipe and form.launched() is run and form._view is None


@pytest.mark.parametrize(
    ("variables", "alone"),
    [
        ({}, True),
        ({"JPY_SESSION_NAME": "10_sft.ipynb"}, False),
        ({"VSCODE_PID": "7"}, False),
        ({"JPY_SESSION_NAME": "10_sft.ipynb", "ASCENT_HEADLESS": "1"}, True),
        ({"ASCENT_HEADLESS": "0"}, False),
    ],
)
def test_somebody_is_there_when_a_server_started_the_kernel(monkeypatch, variables, alone):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "ASCENT_HEADLESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert headless() is alone


def test_the_notebook_launches_the_recipe_of_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setenv("ASCENT_HEADLESS", "1")
    book = nbformat.read(NOTEBOOKS / "10_sft.ipynb", as_version=4)
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    given = "steps, learning_rate, nproc = 30, 5e-4, 1"
    names: dict = {}
    until_form = next(index for index, source in enumerate(cells) if "LaunchForm(" in source)
    for source in [cells[0], given, *cells[1 : until_form + 1]]:
        if "estimate(" not in source:
            exec(source, names)
    changes = parse_changes(["schedule.steps=30", "optim.lr=5e-4", "cluster.nproc=1"])
    assert names["form"].recipe == Recipe.load("sft_tiny").with_changes(changes)
    assert any("form.launched()" in source for source in cells[until_form + 1 :])


# -- the process beside the kernel ---------------------------------------------------------------------


def test_a_kernel_with_a_form_has_neither_torch_nor_pandas():
    code = "import sys; from lab_utils import LaunchForm; LaunchForm('sft_tiny').widget; "
    code += (
        "print([m for m in ('torch', 'pandas', 'colossalai', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_process_answers_in_turn_and_passes_errors_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    away, recipe = _away.Away(), Recipe.load("sft_tiny")
    try:
        found = away.ask("rows", recipe, part="train", index=0, start=2, count=2)
        assert found["total"] == 20000 and len(found["rows"]) == 2 and found["rows"][0]["with_loss"] > 0
        with pytest.raises(LabError, match="no manifest 'nope'") as error:
            away.ask(
                "rows",
                recipe.with_changes({"data.train.0.manifest": "nope"}),
                part="train",
                index=0,
                start=1,
                count=1,
            )
        assert type(error.value).__name__ == "DataError"
        first = away._process.pid
        checks = away.ask("checks", recipe.with_changes({"schedule.batch_tokens": 1000}), root="here")
        assert not checks[0]["ok"] and "batch_tokens" in checks[0]["text"]
        assert any("A new folder in here" in check["text"] for check in checks), (
            "in the kernel's present folder"
        )
        assert away._process.pid == first
        away.end()
        assert away.ask("rows", recipe, part="train", index=0, start=1, count=1)["rows"]
        assert away._process.pid != first
    finally:
        away.end()


@pytest.mark.slow
def test_a_launched_run_is_trained_by_a_job_of_its_own(away, monkeypatch, tmp_path):
    """The real process, the real launcher, and a stand-in for the worker."""
    worker = NOTEBOOKS.parent / "tests" / "runs"
    monkeypatch.setenv("ASCENT_WORKER_MODULE", "stand_in_worker")
    monkeypatch.setenv("PYTHONPATH", str(worker))
    monkeypatch.setattr(_job, "Away", _away.Away)
    form = LaunchForm("sft_tiny", {"schedule.steps": 12, "tracking.wandb": "disabled"})
    press_launch(form)
    run = form.launched()
    assert run.wait(progress=False).state == "succeeded"
    assert attach("last").recipe.hash == form.recipe.hash
    form.field("schedule.batch_tokens").value = "1024"
    form.field("cluster.nproc").value = "3"
    assert form.view.launch.disabled
