"""The recipe refuses what it doesn't know, and its hash depends on what changes the result and on nothing else."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lab_utils.errors import LayoutError, RecipeError
from lab_utils.launchers._base import options_class, options_of
from lab_utils.recipe import Recipe, parse_changes
from lab_utils.recipe.recipe import _keys, takes_samples
from lab_utils.registry import members


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load("sft_tiny")


@pytest.mark.parametrize("name", members("lab_utils.recipes"))
def test_every_named_recipe_loads_and_survives_yaml_with_the_same_hash(name):
    recipe = Recipe.load(name)
    again = Recipe.parse(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe and again.hash == recipe.hash
    recipe.layout()


@pytest.mark.parametrize("name", members("lab_utils.recipes"))
def test_every_named_recipe_says_what_it_is(name):
    from lab_utils.registry import load

    assert load("lab_utils.recipes", name).__doc__


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim.lrr": 1}, "'optim.lrr' is no key of a recipe, did you mean 'lr'?"),
        ({"optm.lr": 1}, "did you mean 'optim.lr'?"),
        ({"schedul": {}}, "did you mean 'schedule'?"),
        ({"optim.lr": -1}, "optim.lr"),
        ({"optim.lr": "fast"}, "optim.lr"),
        ({"schedule.steps": 1.5}, "schedule.steps"),
        ({"data.train.3.weight": 2}, "data.train.3.weight"),
        ({"tracking.wandb": "online"}, "tracking.base_url"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_a_bad_change_is_answered_with_one_sentence_that_names_the_key(recipe, changes, says):
    with pytest.raises(RecipeError) as error:
        recipe.with_changes(changes)
    assert says in str(error.value) and "\n" not in str(error.value)


def of_kind(kind: str, **fields) -> Recipe:
    data = {"train": [{"manifest": "anything"}]}
    return Recipe.parse({"data": data, "objective": {"kind": kind, **fields}})


def test_a_kl_that_holds_nothing_is_refused_as_a_loss():
    recipe = of_kind("grpo", kl_weight=0.1)
    for estimator in ("k2", "k3", "unbiased"):
        assert recipe.with_changes({"objective.kl_estimator": estimator}).objective.kl_weight == 0.1
    with pytest.raises(RecipeError, match="averages to zero; choose unbiased, k2 or k3") as error:
        recipe.with_changes({"objective.kl_estimator": "k1"})
    assert "\n" not in str(error.value)
    with pytest.raises(RecipeError, match=r"kl_estimator would change nothing under objective\.kl_weight=0"):
        of_kind("grpo", kl_estimator="k1")


def test_a_change_of_loss_brings_its_own_values_and_keeps_the_recipes():
    recipe = of_kind("preference")
    assert recipe.objective.resolved().beta == 0.1
    simpo = recipe.with_changes({"objective.loss": "simpo"})
    assert (simpo.objective.resolved().beta, simpo.objective.resolved().target_margin) == (2.0, 1.0)
    assert recipe.with_changes({"objective.loss": "cpo"}).objective.resolved().sft_weight == 1.0
    own = recipe.with_changes({"objective.beta": 0.3, "objective.loss": "simpo"})
    assert own.objective.resolved().beta == 0.3 and own.hash != simpo.hash
    with pytest.raises(RecipeError, match=r"set objective\.loss to simpo"):
        recipe.with_changes({"objective.target_margin": 0.5})


def test_a_missing_recipe_is_answered_with_the_nearest_name():
    with pytest.raises(RecipeError, match="did you mean 'sft_tiny'"):
        Recipe.load("sft_tinny")


def test_a_broken_yaml_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\ndata: [1, 2\n")
    with pytest.raises(RecipeError, match=r"bad\.yaml: not valid YAML at line"):
        Recipe.load(path)
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="expected a mapping"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="no such recipe file"):
        Recipe.load(tmp_path / "none.yaml")


def test_the_hash_ignores_name_and_tracking_and_nothing_else(recipe):
    same = recipe.with_changes({"name": "other", "tracking.log_every": 7})
    assert same.hash == recipe.hash
    for change in ({"seed": 1}, {"optim.lr": 1e-9}, {"data.row_tokens": 256}, {"model.dtype": "bfloat16"}):
        assert recipe.with_changes(change).hash != recipe.hash, change


@given(lr=st.floats(1e-8, 1.0), steps=st.integers(1, 10**6), seed=st.integers(0, 2**31))
def test_text_from_a_command_line_means_the_same_as_a_value(lr, steps, seed):
    recipe = Recipe.load("sft_tiny")
    text = recipe.with_changes(parse_changes([f"optim.lr={lr!r}", f"schedule.steps={steps}", f"seed={seed}"]))
    value = recipe.with_changes({"optim.lr": lr, "schedule.steps": steps, "seed": seed})
    assert text == value and text.hash == value.hash


def test_exponents_without_a_point_are_numbers(recipe):
    assert recipe.with_changes({"optim.lr": "1e-4"}).optim.lr == 1e-4


def test_a_pair_without_a_value_is_refused():
    with pytest.raises(RecipeError, match="expected KEY=VALUE"):
        parse_changes(["optim.lr"])


def test_a_recipe_is_frozen(recipe):
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3


@given(dp=st.integers(1, 8), micro=st.integers(1, 8), accumulation=st.integers(1, 8))
def test_a_layout_covers_the_batch_exactly(dp, micro, accumulation):
    recipe = Recipe.load("sft_tiny").with_changes(
        {
            "schedule.batch_tokens": dp * micro * accumulation * 512,
            "data.row_tokens": 512,
            "schedule.micro_rows": micro,
        }
    )
    assert recipe.layout(dp) == (dp, micro, accumulation)


@pytest.mark.parametrize(
    ("changes", "ranks", "knob"),
    [
        ({"schedule.batch_tokens": 8191}, 2, "use 8192"),
        ({}, 3, "multiple of 1536"),
        ({"parallel.dp": 4}, 2, "parallel.dp=2"),
        ({"schedule.micro_rows": 3}, 2, "divisor of 8"),
    ],
)
def test_ranks_and_rows_that_do_not_divide_are_refused_with_the_knob(changes, ranks, knob):
    base = {"schedule.batch_tokens": 8192, "data.row_tokens": 512, "schedule.micro_rows": None}
    recipe = Recipe.load("sft_tiny").with_changes({**base, **changes})
    with pytest.raises(LayoutError, match=knob):
        recipe.layout(ranks)


def test_every_field_is_described():
    def fields(section, path=""):
        for name, field in section.model_fields.items():
            inner = [field.annotation, *get_args(field.annotation)]
            sections = [each for each in inner if isinstance(each, type) and hasattr(each, "model_fields")]
            for each in sections:
                yield from fields(each, f"{path}{name}.")
            if not sections and name != "kind":
                yield path + name, field.description

    assert [name for name, description in fields(Recipe) if not description] == []


# optimizers.md names modules of optim/, not keys.
GUIDES = [p for p in sorted((Path(__file__).parents[1] / "docs").glob("*.md")) if p.stem != "optimizers"]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_recipes_and_keys_in_the_docs_are_of_this_version(page):
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        # A page may show some sections alone.
        tree = {"data": {"train": [{"manifest": "none"}]}, **yaml.safe_load(block)}
        recipe = Recipe.parse(tree, page.name)
        options_of(recipe)
        if "schedule" in tree:
            recipe.layout()
    sections = "|".join(name for name in Recipe.model_fields if name not in ("name", "seed", "model"))
    settings = [options_class(name) for name in members("lab_utils.launchers")]
    options = {key for each in settings if each for key in each.model_fields}
    known = [*_keys(Recipe), *(f"cluster.options.{key}" for key in options)]
    for key in re.findall(rf"`((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)", text):
        assert any(f"{each}.".startswith(f"{key}.") for each in known), f"{page.name} names {key}"


def test_rows_cut_over_ranks_are_for_losses_that_are_sums_over_tokens():
    assert Recipe.load("sft_tiny").with_changes({"parallel.cp": 2}).parallel.cp == 2
    for name in ("preference_tiny", "grpo_tiny"):
        with pytest.raises(RecipeError, match=r"compares whole answers: set parallel\.cp to 1"):
            Recipe.load(name).with_changes({"parallel.cp": 2})


def test_rows_are_dealt_out_to_the_groups_that_share_them(recipe):
    changes = {
        "parallel.cp": 4,
        "schedule.batch_tokens": 8 * recipe.data.row_tokens,
        "schedule.micro_rows": 1,
    }
    assert recipe.with_changes(changes).layout(8) == (2, 1, 4)
    with pytest.raises(LayoutError, match="shared evenly by 8 groups of 4 ranks"):
        recipe.with_changes({**changes, "schedule.batch_tokens": 4 * recipe.data.row_tokens}).layout(32)


def test_a_reward_model_with_token_prediction_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"mtp_loss=0\.1 predicts tokens, and a reward model"):
        recipe.with_changes({"objective": {"kind": "reward"}, "model.mtp_loss": 0.1})


def test_every_problem_of_a_tree_is_named_by_its_key_unknown_ones_first():
    tree = {
        "data": {"train": [{"manifesto": "x"}]},
        "optim": {"lr": -1},
        "objective": {"kind": "grpo", "clip_low": 2},
    }
    found = Recipe.problems(tree)
    assert [key for key, _ in found] == [
        "data.train.0.manifesto",
        "data.train.0.manifest",
        "objective.clip_low",
        "optim.lr",
    ]
    assert "did you mean 'manifest'?" in found[0][1] and all("\n" not in text for _, text in found)
    assert Recipe.problems({"data": {"train": [{"manifest": "x"}]}}) == []


@pytest.mark.parametrize(
    "objective", [{"kind": "grpo"}, {"kind": "distill", "on_policy": False}, {"kind": "sft"}, {}]
)
def test_rollout_is_there_where_the_objective_takes_samples(objective):
    teachers = {"teachers": [{"source": "base:tiny"}]} if objective.get("kind") == "distill" else {}
    tree = {"data": {"train": [{"manifest": "x"}]}, "objective": objective | teachers}
    assert (Recipe.parse(tree).rollout is not None) == takes_samples(objective)
