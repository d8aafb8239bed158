"""``parallel: auto``: the planner's best layout in the recipe, and what is said where there is none."""

import pytest
import yaml

from lab_utils.errors import LayoutError, RecipeError
from lab_utils.planner.auto import chosen, fastest, profile_of
from lab_utils.planner.cluster import find
from lab_utils.planner.own import machines
from lab_utils.planner.plan import check, plan
from lab_utils.recipe import Recipe

OPEN = {"parallel": "auto"}


@pytest.fixture
def cores(tmp_path):
    """A machine of two cores that was measured once, as a cluster of one's own."""
    path = tmp_path / "cores.yaml"
    path.write_text(yaml.safe_dump(machines()[0]["cluster"]))
    return str(path)


def on_cores(cores, **changes):
    two = {"parallel": "auto", "cluster.nproc": 2, "cluster.accelerator": "cpu", "cluster.profile": cores}
    return Recipe.load("sft_tiny").with_changes(two | changes)


def test_the_choice_is_the_best_of_a_plan_and_what_else_the_recipe_says_stays():
    given = Recipe.load("v4_pro_sft")
    found = chosen(given.with_changes(OPEN))
    best = plan(given, "ascend-910c", 1024).best
    assert found.parallel == best.recipe.parallel.model_copy(update={"dp": best.placed.dp})
    assert found.schedule.micro_rows == best.placed.micro_rows
    assert found.model.checkpointing == best.recipe.model.checkpointing
    same = {
        name: getattr(given, name) for name in ("data", "objective", "optim", "cluster", "tracking", "seed")
    }
    assert {name: getattr(found, name) for name in same} == same
    assert found.layout()[0] == best.placed.dp and check(found, "ascend-910c").fits


def test_a_recipe_that_names_its_layout_is_left_alone():
    recipe = Recipe.load("v4_pro_sft")
    assert chosen(recipe) is recipe


def test_one_rank_needs_no_cluster():
    found = chosen(
        Recipe.load("sft_tiny").with_changes({"parallel": "auto", "parallel.zero": 0, "cluster.nproc": 1})
    )
    assert not found.parallel.auto and found.layout()[0] == 1 and found.parallel.zero == 0


def test_the_word_and_the_field_are_the_same_recipe(tmp_path, cores):
    recipe = on_cores(cores)
    tree = yaml.safe_load(recipe.to_yaml())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree | {"parallel": "auto"}))
    assert (
        Recipe.load(path)
        == recipe
        == Recipe.load("sft_tiny").with_changes(
            {"parallel.auto": True, **{f"cluster.{key}": value for key, value in tree["cluster"].items()}}
        )
    )


def test_a_profile_changes_where_a_layout_is_looked_for_and_no_result(cores):
    recipe = Recipe.load("sft_tiny")
    assert recipe.with_changes({"cluster.profile": cores}).hash == recipe.hash
    assert profile_of(recipe.with_changes({"cluster.profile": "h200"})) == find("h200")
    npu = {"cluster.accelerator": "npu", "cluster.launcher": "slurm"}
    assert profile_of(recipe.with_changes(npu)) == find("ascend-910c")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"parallel.ep": 2}, "parallel.ep is 2: give one of the two"),
        ({"parallel.offload": True}, "parallel.offload is True"),
        ({"schedule.micro_rows": 1}, "chooses schedule.micro_rows as well, and it is 1"),
        ({"model.checkpointing": "full"}, "chooses model.checkpointing as well, and it is full"),
        ({"parallel": "automatic"}, "parallel"),
    ],
)
def test_a_layout_is_chosen_or_given(cores, change, says):
    with pytest.raises(RecipeError, match=says):
        on_cores(cores, **change)


def test_what_has_no_layout_yet_says_how_to_get_one(cores):
    with pytest.raises(LayoutError, match=r"lab plan RECIPE --write FILE"):
        on_cores(cores).layout()


def test_chips_that_nobody_named_are_asked_for():
    recipe = Recipe.load("sft_tiny").with_changes(
        {"parallel": "auto", "cluster.launcher": "slurm", "cluster.nproc": 8}
    )
    with pytest.raises(LayoutError, match=r"set cluster\.profile"):
        chosen(recipe)
    with pytest.raises(RecipeError, match=r"cluster\.profile ascend-910x: .*ascend-910c"):
        chosen(recipe.with_changes({"cluster.profile": "ascend-910x"}))


def test_where_nothing_fits_the_sentence_says_what_would_make_room():
    recipe = Recipe.load("v4_pro_sft").with_changes({**OPEN, "cluster.nodes": 4})
    with pytest.raises(LayoutError, match="Nothing fits 64 GiB"):
        chosen(recipe)


def test_a_search_over_an_open_layout_is_the_one_over_a_given(cores):
    recipe = on_cores(cores)
    given = recipe.with_changes({"parallel": {"ep": 2}})
    assert fastest(recipe, find(cores), 2) == fastest(given, find(cores), 2)
