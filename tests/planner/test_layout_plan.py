"""The search, what a plan says, and the command."""

import json
import time

import pytest
from typer.testing import CliRunner

from lab_utils.errors import LayoutError
from lab_utils.planner import questions
from lab_utils.planner.advice import reach
from lab_utils.planner.cluster import find
from lab_utils.planner.plan import check, plan
from lab_utils.recipe import Recipe


@pytest.fixture(scope="module")
def pro():
    return plan("v4_pro_sft", "ascend-910c", 1024)


@pytest.fixture(scope="module")
def flash():
    return plan("v4_flash_sft", "ascend-910c", 128)


def test_pro_on_1024_packages_has_the_parameters_and_flops_of_the_report_and_fits(pro):
    tree = pro.as_dict()
    assert tree["parameters"] == 1_598_837_325_086
    assert tree["active_parameters"] == pytest.approx(49.8e9, rel=5e-3)
    assert tree["flops_per_token"] == pytest.approx(309.9e9, rel=5e-3)
    best = tree["best"]
    assert tree["fits"] and best["memory_peak_gib"] <= 64 and best["mfu_denominator_tflops"] == 376
    assert sum(best["memory_gib"].values()) == pytest.approx(best["memory_peak_gib"], abs=0.02)
    assert sum(best["step_terms_s"].values()) == pytest.approx(best["step_s"], abs=0.02)
    assert best["tokens_per_s"] == pytest.approx(tree["tokens_per_step"] / best["step_s"], rel=1e-3)
    assert best["binding"] and best["layout"]["dp"] * best["layout"]["cp"] * best["layout"]["pp"] == 2048


def test_rows_of_32k_tokens_fit_where_ranks_share_them_and_not_whole():
    longer = Recipe.load("v4_pro_sft").with_changes({"data.row_tokens": 32768})
    made = plan(longer, "ascend-910c", 1024)
    assert made.fits and made.best.placed.cp >= 8 and made.best.placed.tokens == 6144 * 4096
    whole = [c for c in made.found.fitting if c.placed.cp == 1]
    assert not whole
    for candidate in made.found.fitting:
        placed = candidate.placed
        assert placed.dp * placed.cp * placed.pp == 2048 and placed.micro_tokens * placed.cp % 32768 == 0


def test_the_search_is_quick():
    start = time.process_time()
    plan("v4_pro_sft", "ascend-910c", 1024)
    assert time.process_time() - start < 10


def test_no_layout_of_the_front_is_beaten_and_the_best_is_the_fastest(flash):
    front = flash.front()
    assert front[0] is flash.best
    for candidate in flash.candidates:
        assert not any(
            candidate.time.seconds < f.time.seconds and candidate.peak_gib < f.peak_gib for f in front
        )
        assert candidate.fits and candidate.time.seconds >= flash.best.time.seconds


def test_the_recipes_that_ship_are_as_good_as_the_fastest_and_leave_a_tenth_of_the_memory(pro, flash):
    for made in (pro, flash):
        own = check(made.recipe, made.cluster)
        assert own.fits and own.placed.ranks == made.ranks
        assert own.time.seconds <= 1.05 * made.best.time.seconds and own.peak_gib < 0.9 * own.room_gib


def test_a_plan_becomes_a_recipe_that_is_laid_out_as_planned(flash):
    launched = flash.to_recipe()
    assert launched.cluster.nodes * launched.cluster.nproc == 256 and launched.cluster.accelerator == "npu"
    dp, micro, passes = launched.layout()
    placed = flash.best.placed
    assert (dp, micro, passes) == (placed.dp, placed.micro_rows, placed.passes)
    assert Recipe.parse(launched.model_dump(mode="json")).hash == launched.hash


def test_a_layout_that_does_not_fit_is_refused_with_its_terms_and_a_knob():
    planted = Recipe.load("v4_pro_sft").with_changes({"model.checkpointing": "none"})
    with pytest.raises(LayoutError) as error:
        check(planted, "ascend-910c", 1024)
    text = str(error.value)
    assert "GiB" in text and "activations" in text and "model.checkpointing=full" in text and "\n" not in text


def test_what_never_fits_says_by_how_much_and_what_would_make_room():
    made = plan("v4_pro_sft", "ascend-910c", 64)
    assert not made.fits and made.best is None
    said = " ".join(made.knobs())
    assert "needs" in said and "--chips" in said
    with pytest.raises(LayoutError, match="GiB"):
        made.to_recipe()


def test_advice_has_numbers_and_names_the_knob(flash):
    said = flash.advice()
    assert any(text.startswith("schedule.batch_tokens=") and "tokens/s instead of" in text for text in said)
    assert any("model.checkpointing=" in text for text in said)
    assert all(any(c.isdigit() for c in text) for text in said)


@pytest.mark.slow
def test_a_wanted_utilisation_names_what_would_have_to_be_true(flash):
    found = reach(flash.recipe, flash.cluster, flash.ranks, flash.assumed, 0.40)
    assert found.candidate is not None and found.conditions
    if found.reached:
        assert found.candidate.time.mfu >= 0.40 and all("without it" in text for text in found.conditions)
    assert len(found.sentences()) == 1 + len(found.conditions)


def test_a_data_set_costs_time_and_energy_in_proportion(flash):
    one, ten = (questions.cost(flash, tokens) for tokens in (1e9, 1e10))
    assert ten.hours == pytest.approx(10 * one.hours, rel=0.01) and ten.chip_hours == ten.hours * 128
    assert one.megawatt_hours == pytest.approx(one.hours * 128 * 1456 / 1e6)


@pytest.mark.slow
def test_a_deadline_is_met_by_the_fewest_chips():
    recipe = Recipe.load("v4_flash_sft")
    hours = questions.cost(plan(recipe, "ascend-910c", 128), 2e10).hours
    loose = questions.chips_for(recipe, "ascend-910c", 2e10, 1.2 * hours / 24, most=256)
    assert loose is not None and loose.chips <= 128
    assert questions.chips_for(recipe, "ascend-910c", 2e12, 0.1, most=64) is None


@pytest.mark.slow
def test_the_longest_rows_that_fit_are_no_shorter_than_the_recipes(flash):
    tokens, made = questions.largest_context(flash.recipe, "ascend-910c", 128)
    assert tokens >= 4096 and made is not None and made.best.peak_gib <= 64


def test_groups_that_straddle_a_superpod_are_named(pro):
    cluster = find("ascend-910c")
    whole = pro.best.placed
    assert questions.straddling(whole, cluster.planes[0]) == 0
    from lab_utils.planner.placed import place

    recipe = Recipe.load("v4_flash_sft")
    degrees = {"parallel.ep": 256, "parallel.pp": 1, "parallel.virtual_stages": 1}
    odd = recipe.with_changes({**degrees, "schedule.batch_tokens": 4096 * 4096})
    placed = place(odd, 1024)
    assert questions.straddling(placed, cluster.planes[0]) == 0  # 768 = 3 × 256
    small = cluster.model_copy(
        update={"planes": (cluster.planes[0].model_copy(update={"devices": 192}), cluster.planes[1])}
    )
    said = questions.crossings(placed, small)
    assert any("ep groups straddle a boundary of 192 devices" in text for text in said)


# -- the command --------------------------------------------------------------------------------------------------


def run(*words: str):
    import typer

    from lab_utils.planner.commands import plan as command

    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words))


def test_the_command_prints_the_stable_interface():
    done = run("v4_flash_sft", "--cluster", "ascend-910c", "--chips", "128", "--json", "--tokens", "1e9")
    tree = json.loads(done.stdout)
    assert {"parameters", "active_parameters", "flops_per_token", "fits", "best", "candidates"} <= set(tree)
    wanted = "layout memory_gib memory_peak_gib step_s step_terms_s tokens_per_s mfu mfu_denominator_tflops binding"
    assert set(wanted.split()) <= set(tree["best"]) and tree["predicted"] is True
    assert tree["data_set"]["steps"] == -(-(10**9) // tree["tokens_per_step"])


def test_the_command_reads_like_a_page():
    done = run("v4_flash_sft", "--chips", "128")
    assert done.exit_code == 0
    for words in (
        "The fastest layout that fits",
        "Memory of stage",
        "A step",
        "One change would give",
        "predicted",
    ):
        assert words in done.stdout


def test_the_command_refuses_a_layout_that_does_not_fit():
    done = run(
        "v4_flash_sft",
        "--chips",
        "128",
        "--as-is",
        "--set",
        "model.checkpointing=none",
        "--set",
        "parallel.pp=1",
    )
    assert isinstance(done.exception, LayoutError)


def test_the_command_writes_a_recipe(tmp_path):
    path = tmp_path / "planned.yaml"
    run("v4_flash_sft", "--chips", "128", "--write", str(path))
    assert Recipe.load(path).cluster.world_size == 256


def test_clusters_are_listed():
    done = run("--clusters", "--json")
    assert {"ascend-910c", "ascend-910b", "h200", "h100", "gb300"} <= {
        each["name"] for each in json.loads(done.stdout)
    }
