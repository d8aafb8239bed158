"""The command line starts light, answers errors with one sentence, and prints JSON that a program can read."""

import json
import subprocess
import sys

import pytest


def lab(*words: str, check: bool = False) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-m", "lab_utils.cli", *words], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


# What costs seconds, or a tenth of one: a start that has none of these takes a fraction of a second anywhere, and a
# test of the time itself would fail on a busy machine.
HEAVY = (
    "torch",
    "colossalai",
    "transformers",
    "numpy",
    "pandas",
    "matplotlib",
    "wandb",
    "IPython",
    "ipywidgets",
)
ALSO_SLOW = ("pydantic", "yaml", "psutil", "rich.console", "jupyter_client")
HELP = "import sys; sys.argv = ['lab', '--help']; import lab_utils.cli as c; c._mount(); c.app(standalone_mode=False)"


@pytest.mark.parametrize(
    "statement",
    ["import lab_utils", "import lab_utils.cli; lab_utils.cli._mount()", HELP],
    ids=["import", "mount", "help"],
)
def test_start_up_imports_nothing_heavy(statement):
    code = f"import json, sys; {statement}; print(json.dumps([m for m in {HEAVY + ALSO_SLOW} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_help_is_plain_text_with_the_first_sentence_of_each_verb():
    text = lab("card", "--help", check=True).stdout
    assert "Make the card of a run" in text and "--json" in text and "╭" not in text


def test_help_names_every_verb():
    from lab_utils.cli import VERBS

    text = lab("--help", check=True).stdout
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize(
    "words",
    [
        ("recipe", "show", "nothing"),
        ("recipe", "show", "sft_tiny", "--set", "optim.lrr=1"),
        ("run", "sft_tiny", "--set", "schedule.batch_tokens=100"),
        ("runs", "show", "no-such-run"),
        ("data", "verify", "no-such-manifest"),
        ("model", "show", "no-such-model"),
        ("notebook", "10_sftt"),
        ("notebook", "10_sft", "-p", "stepz", "3"),
        ("audit", "no-such-run"),
        ("export", "no-such-run", "somewhere"),
        ("bench", "step", "--shapes", "8by256"),
    ],
)
def test_a_failing_command_prints_one_sentence_and_exits_non_zero(words, tmp_path, monkeypatch):
    monkeypatch.setenv("ASCENT_RUNS", str(tmp_path))
    done = lab(*words)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_debug_shows_the_traceback():
    assert "Traceback" in lab("--debug", "recipe", "show", "nothing").stderr


def test_a_recipe_prints_as_json_with_its_hash():
    from lab_utils.recipe import Recipe

    shown = json.loads(lab("recipe", "show", "sft_tiny", "--json", check=True).stdout)
    assert shown["hash"] == Recipe.load("sft_tiny").hash
    names = [row["recipe"] for row in json.loads(lab("recipe", "list", "--json", check=True).stdout)]
    assert "sft_tiny" in names
