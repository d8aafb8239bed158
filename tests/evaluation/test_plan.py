"""What an evaluation is about is settled, or refused in a sentence, before any weights are read."""

import subprocess
import sys

import pytest
from stand_ins import run_with_checkpoints

from lab_utils.data.add import add
from lab_utils.errors import CheckpointError, DataError, LabError, RecipeError, RunError
from lab_utils.evaluation.held_out import find_split, load_held_out, load_questions, split_specs
from lab_utils.evaluation.plan import BUDGETS, Plan, make_plan
from lab_utils.evaluation.targets import resolve

PROMPTS = "ascent-tasks-prompts"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(root):
    made = run_with_checkpoints(root, 10, 20)
    (made.path / "checkpoints" / "step-000030" / "model").mkdir(parents=True)  # never finished
    return made


# -- held-out rows -------------------------------------------------------------------------------------------


def test_a_limit_spreads_the_questions_evenly_over_the_families():
    everything = load_questions(PROMPTS)
    families = {q["verify"]["family"] for q in everything}
    some = load_questions(PROMPTS, limit=3 * len(families))
    counts = [sum(q["verify"]["family"] == f for q in some) for f in families]
    assert counts == [3] * len(families) and len(everything) > len(some)


def test_questions_need_a_prompt_set():
    with pytest.raises(DataError, match="questions need format prompt"):
        load_questions("ascent-tasks-sft")


def test_the_split_is_test_unless_named_or_missing():
    assert find_split(PROMPTS)[1] == "test" and find_split("ascent-tasks-text")[1] == "validation"
    assert find_split(f"{PROMPTS}:validation", "test")[1] == "validation"
    assert find_split(PROMPTS, "validation")[1] == "validation"
    with pytest.raises(DataError, match="neither a test nor a validation split"):
        find_split("tulu-3-sft-mixture")
    with pytest.raises(DataError, match="no split 'tset'"):
        find_split(f"{PROMPTS}:tset")


def test_manifests_are_given_with_commas_or_as_a_list():
    assert split_specs("a, b:test,") == split_specs(["a", "b:test"]) == ["a", "b:test"]
    with pytest.raises(DataError, match="names no manifest"):
        split_specs(" ,")


def test_a_question_that_no_verifier_knows_is_refused(tmp_path):
    rows = tmp_path / "odd.jsonl"
    rows.write_text(
        '{"messages": [{"role": "user", "content": "?"}], "verify": {"family": "sfety", "kind": "exact"}}\n'
    )
    made = add(rows, format="prompt", folder=tmp_path)
    with pytest.raises(DataError, match="did you mean 'safety'"):
        load_held_out(str(made.path), "train")


# -- targets -------------------------------------------------------------------------------------------------


def test_a_run_means_its_last_complete_checkpoint_and_starts_from_its_base(run, root, monkeypatch):
    monkeypatch.setenv("ASCENT_RUNS", str(root))
    for text in ("last", run.name, run.name[:12], str(run.path)):
        target = resolve(text)
        assert (target.checkpoint, target.run) == ("step-000020", str(run.path))
        assert target.folder() == run.path and target.base().source == "base:tiny"
        assert target.base().folder() is None and target.base().base() is None


def test_a_checkpoint_has_a_folder_of_its_own_unless_it_is_the_last(run):
    earlier = resolve(run.path / "checkpoints" / "step-000010")
    assert earlier.folder() == run.path / "evaluations" / "step-000010"
    assert resolve(run.path / "checkpoints" / "step-000010" / "model") == earlier
    assert resolve(run.path / "checkpoints" / "step-000020").folder() == run.path
    with pytest.raises(CheckpointError, match=r"not complete .*complete: step-000010, step-000020"):
        resolve(run.path / "checkpoints" / "step-000030")


def test_weights_of_no_run_have_neither_base_nor_folder(run):
    from lab_utils.models.load import SHIPPED

    for text in ("base:tiny", "preset:tiny", str(SHIPPED / "tiny")):
        target = resolve(text)
        assert target.run is None and target.base() is None and target.folder() is None
    assert (
        resolve("base:tiny").encoding().tokenizer.vocab_size
        == resolve(run.path).encoding().tokenizer.vocab_size
    )


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("base:tinny", RecipeError, "no model 'tinny' ships"),
        ("some/folder", RunError, "no run .*checkpoint of a run .*model folder"),
        ("nosuchrun", RunError, "no run 'nosuchrun'"),
    ],
)
def test_a_target_that_does_not_exist_is_refused(run, root, monkeypatch, text, error, match):
    monkeypatch.setenv("ASCENT_RUNS", str(root))
    with pytest.raises(error, match=match):
        resolve(text)


# -- plans ---------------------------------------------------------------------------------------------------


def test_a_plan_survives_its_way_through_json(run):
    plan = make_plan(
        str(run.path), on=f"{PROMPTS},ascent-tasks-text", modes="chat,max", budget="max=500", samples=4, k="1,4",
        against="base:tiny", reference="preset:tiny", limit=3,
    )  # fmt: skip
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.budgets == (BUDGETS["chat"], 500) and plan.ks == (1, 4) and plan.base.source == "base:tiny"
    assert [spec.rpartition(":")[2] for spec in plan.on] == ["test", "validation"]
    assert plan.reference.run == str(run.path)  # it has no tokenizer of its own


def test_settings_not_given_are_the_runs_own(run):
    recipe = run.recipe
    plan = make_plan(str(run.path), on=PROMPTS, samples=3, base=False)
    assert plan.modes == (recipe.data.mode,) and plan.row_tokens == recipe.data.row_tokens
    assert plan.ks == (1, 3) and plan.base is None
    assert make_plan("base:tiny", on=PROMPTS, base="preset:tiny").base.source == "preset:tiny"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"modes": "chat,thnking"}, "did you mean 'thinking'"),
        ({"budget": "max=9"}, "mode 'max', which is not evaluated"),
        ({"budget": "many"}, "give a number of tokens"),
        ({"budget": 0}, "give a number of tokens"),
        ({"samples": 2, "k": "1,4"}, "2 samples allow"),
        ({"samples": 2, "k": "0"}, "2 samples allow"),
        ({"samples": 2, "k": "one"}, "numbers with commas"),
        ({"k": "1"}, "--k needs sampled answers"),
        ({"samples": -1}, "--samples is -1"),
        ({"samples": 1, "temperature": 0.0}, "--temperature is 0"),
        ({"limit": 0}, "--limit is 0"),
        ({"dtype": "fp16"}, "--dtype"),
        ({"judge": "base:tiny"}, "name the other one with --against"),
        ({"on": "ascent-tasks-prompt"}, "did you mean 'ascent-tasks-prompt"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(options, match):
    with pytest.raises(LabError, match=match) as error:
        make_plan("base:tiny", **{"on": PROMPTS, **options})
    assert str(error.value).endswith((".", "?", ")."))


def test_planning_and_reading_reports_import_no_torch():
    code = (
        "import sys; from lab_utils.evaluation import commands, report, tables; "
        "from lab_utils.evaluation.plan import make_plan; make_plan('base:tiny', on='ascent-tasks-prompts'); "
        "print([m for m in ('torch', 'transformers', 'pandas', 'seaborn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
