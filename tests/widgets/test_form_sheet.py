"""The form's fields and the recipe are one and the same; what is wrong is said at the field."""

import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipes import FREE, WORDS, recipes

from lab_utils.errors import RecipeError
from lab_utils.recipe import Recipe
from lab_utils.recipe.recipe import _keys
from lab_utils.registry import members
from lab_utils.widgets._field import ABSENT, MISSING
from lab_utils.widgets._schema import groups
from lab_utils.widgets._sheet import Sheet, difference


def sheet(name: str = "sft_tiny") -> Sheet:
    return Sheet(Recipe.load(name), name)


# -- form → recipe → form ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(recipes(), recipes())
def test_a_recipe_goes_through_the_fields_without_loss_whatever_stood_there_before(recipe, before):
    form = Sheet(before, "before")
    form.load(recipe, "any")
    assert form.recipe == recipe and form.recipe.hash == recipe.hash
    assert form.changes() == []
    assert Recipe.parse(yaml.safe_load(form.recipe.to_yaml())).hash == recipe.hash


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(["partition", "hours", "exclusive", "cpus", "other"]) | WORDS, FREE, max_size=4
    )
)
def test_settings_of_a_launcher_go_through_its_fields_whether_it_takes_them_or_not(options):
    recipe = Recipe.load("sft_tiny").with_changes({"cluster.launcher": "slurm"})
    recipe = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"options": options})})
    assert Sheet(recipe, "any").recipe.cluster.options == options


@pytest.mark.parametrize("name", members("lab_utils.recipes"))
def test_every_named_recipe_is_what_the_form_makes_of_it(name):
    form = sheet(name)
    assert form.recipe == Recipe.load(name) and not form.problems


def test_every_key_of_a_recipe_has_a_field_with_its_meaning():
    fields = [field for group in groups() for field in group.fields]
    tags = [group.tag.key for group in groups() if group.tag]
    assert {*(field.key for field in fields), *tags} == {
        key
        for key in _keys(Recipe)
        if not key.startswith(("data.train.", "data.validation.", "objective.teachers."))
        and not key.startswith("objective.rewards.")
    } | {"data.train", "data.validation", "objective.teachers", "objective.rewards"}
    assert all(field.meaning for field in fields)
    limits = {field.id: field.limits for field in fields}
    assert limits["optim.lr"] == "> 0" and limits["schedule.decay_fraction"] == "> 0, ≤ 1"
    assert limits["objective.preference.label_smoothing"] == "≥ 0, < 0.5" and limits["name"] == ""


# -- typing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("schedule.steps", "1_000", 1000),
        ("schedule.steps", "1e3", 1000),
        ("schedule.steps", " 7 ", 7),
        ("optim.lr", "3e-4", 3e-4),
        ("optim.betas", "[0.8, 9e-1]", (0.8, 0.9)),
        ("parallel.dp", "", None),
        ("parallel.dp", "2", 2),
        ("parallel.zero", 0, 0),
        ("parallel.offload", True, True),
        ("model.tokenizer", "", None),
        ("model.tokenizer", "tokens/", "tokens/"),
        ("model.tokenizer", '""', ""),
        ("model.source", "", "base:tiny"),
        ("schedule.keep_last", "", 2),
        ("data.validation", "", ()),
        ("data.mode", "thinking", "thinking"),
    ],
)
def test_what_is_typed_means_what_a_person_expects(key, typed, value):
    form = sheet()
    form.write(key, typed)
    found = form.recipe
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("changes", "at", "says"),
    [
        ({"optim.lr": "fast"}, "optim.lr", "optim.lr: .*number.*'fast'"),
        ({"optim.lr": "-1"}, "optim.lr", "greater than 0"),
        ({"schedule.steps": "2.5"}, "schedule.steps", "integer"),
        ({"name": "a/b"}, "name", "pattern"),
        ({"data.train": ""}, "data.train", "'data.train' is missing"),
        ({"data.train": "- manifesto: x"}, "data.train", "did you mean 'manifest'"),
        ({"data.train": "- manifest: x\n split"}, "data.train", "not valid YAML at line 2"),
        ({"optim.momentum": "0.5"}, "optim.momentum", "is Muon's"),
        ({"tracking.wandb": "online"}, "tracking.wandb", "tracking.base_url is empty"),
        ({"schedule.batch_tokens": "1000"}, "schedule.batch_tokens", "not a multiple of data.row_tokens"),
        ({"cluster.nproc": "3"}, "schedule.batch_tokens", "multiple of 1536, or change cluster.nproc"),
        ({"parallel.pp": "3"}, "parallel.pp", "does not divide 2 ranks"),
        ({"cluster.launcher": "slrum"}, "cluster.launcher", "no launcher 'slrum'"),
        ({"parallel.auto": True, "parallel.ep": "2"}, "parallel.auto", "ep is 2: give one of the two"),
        ({"parallel.auto": True, "schedule.micro_rows": "2"}, "parallel.auto", "chooses schedule.micro_rows"),
    ],
)
def test_a_mistake_is_one_sentence_at_its_field(changes, at, says):
    form = sheet()
    for key, typed in changes.items():
        form.write(key, typed)
    assert form.problems.keys() == {at}
    assert form.message == form.problems[at] and "\n" not in form.message
    assert re.search(says, form.message)


def test_the_recipe_of_a_wrong_form_is_refused_with_the_forms_message_and_comes_back():
    form = sheet()
    form.write("optim.lr", "fast")
    with pytest.raises(RecipeError, match=r"optim\.lr"):
        _ = form.recipe
    form.write("optim.lr", "2e-3")
    assert form.recipe == Recipe.load("sft_tiny") and form.message == ""


def test_ranks_that_do_not_divide_are_a_recipe_that_cannot_be_launched():
    form = sheet()
    form.write("cluster.nproc", "3")
    assert form.message and form.recipe.cluster.nproc == 3


def test_a_layout_that_the_planner_will_choose_need_not_divide_yet():
    form = sheet()
    form.write("cluster.nproc", "3")
    form.write("parallel.auto", True)
    assert form.message == "" and form.recipe.parallel.auto


# -- fields that come and go ---------------------------------------------------------------------------


def keys(form: Sheet) -> set[str]:
    return {field.key for group in groups() for field in form.fields(group)}


def test_another_kind_brings_its_fields_and_gives_back_what_stood_in_the_others():
    form = sheet()
    assert "rollout.prompts" not in keys(form) and "objective.beta" not in keys(form)
    form.write("objective.kind", "preference")
    form.write("objective.loss", "ipo")
    form.write("objective.beta", "0.3")
    form.write("objective.kind", "grpo")
    assert "rollout.prompts" in keys(form) and form.recipe.rollout is not None
    assert form.recipe.objective.loss == "grpo"
    form.write("rollout.prompts", "8")
    form.write("objective.kind", "preference")
    assert form.recipe.objective.loss == "ipo" and form.recipe.objective.beta == 0.3
    assert form.recipe.rollout is None
    form.write("objective.kind", "grpo")
    assert form.recipe.rollout.prompts == 8


def test_the_rollout_section_follows_on_policy():
    form = sheet("distill_tiny")
    assert "rollout.prompts" in keys(form)
    form.write("objective.on_policy", False)
    assert "rollout.prompts" not in keys(form) and form.recipe.rollout is None


def test_a_field_that_the_loss_does_not_read_is_named():
    form = sheet("preference_tiny")
    form.write("objective.target_margin", "1")
    assert (
        "would change nothing under objective.loss=dpo" in form.problems["objective.preference.target_margin"]
    )


def test_a_launchers_settings_are_fields_of_their_own():
    form = sheet()
    assert "cluster.options.partition" not in keys(form)
    form.write("cluster.launcher", "slurm")
    assert form.recipe.cluster.options == {}, "what says nothing is left out"
    form.write("cluster.options.partition", "910c")
    form.write("cluster.options.hours", "2.5")
    form.write("cluster.options.exclusive", False)
    assert form.recipe.cluster.options == {"partition": "910c", "hours": 2.5, "exclusive": False}
    form.write("cluster.options.exclusive", ABSENT)
    assert form.recipe.cluster.options == {"partition": "910c", "hours": 2.5}
    form.write("cluster.options.hours", "-1")
    assert "greater than 0" in form.problems["cluster.options.slurm.hours"]
    form.write("cluster.launcher", "local")
    assert form.recipe.cluster.options == {} and not form.problems


def test_a_setting_that_the_launcher_does_not_know_stands_with_the_rest_and_is_refused():
    recipe = Recipe.load("sft_tiny").with_changes(
        {"cluster.launcher": "slurm", "cluster.options": {"partition": "a", "partitoin": "b"}}
    )
    form = Sheet(recipe, "mine")
    assert form.recipe == recipe and form.shown["cluster.options"] == "partitoin: b"
    assert "did you mean 'partition'" in form.problems["cluster.options"]
    form.write("cluster.options", "")
    assert form.recipe.cluster.options == {"partition": "a"} and not form.problems
    assert "cluster.options" not in keys(form), "there where it holds something"
    here = Sheet(recipe.with_changes({"cluster.launcher": "local"}), "mine")
    assert "the launcher 'local' has no settings" in here.problems["cluster.options"]


# -- what differs --------------------------------------------------------------------------------------


def test_changes_are_what_was_and_what_is():
    form = sheet()
    form.write("optim.lr", "3e-3")
    form.write("schedule.micro_rows", "1")
    assert form.changes() == [("optim.lr", 0.002, 0.003), ("schedule.micro_rows", None, 1)]


def test_defaults_of_another_kind_are_no_changes():
    form = sheet()
    form.write("objective.kind", "grpo")
    form.write("rollout.prompts", "32")
    assert form.changes() == [
        ("objective.kind", "sft", "grpo"),
        ("objective.loss", "nll", "grpo"),
        ("rollout.prompts", MISSING, 32),
    ]


def test_a_difference_read_backwards_is_the_same_difference():
    one, two = Recipe.load("grpo_tiny"), Recipe.load("preference_tiny")
    there, back = difference(one, two), difference(two, one)
    assert {(key, now, was) for key, was, now in there if not isinstance(was, list)} == {
        each for each in back if not isinstance(each[1], list)
    }
    assert ("objective.sft_weight", MISSING, 1.0) in there
