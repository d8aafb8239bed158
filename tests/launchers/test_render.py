"""``lab render`` and the words for where a run goes."""

import json

import pytest
import typer
from typer.testing import CliRunner

from lab_utils.errors import RecipeError
from lab_utils.launchers._base import preview
from lab_utils.launchers._commands import places, render
from lab_utils.recipe import Recipe

app = typer.Typer()
app.command()(render)


def lab(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_render_prints_the_very_script(tmp_path, launcher, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20261125-120000")
    wanted = Recipe.load("sft_tiny").with_changes({"cluster.launcher": launcher, "cluster.nproc": 4})
    text = lab("sft_tiny", "--launcher", launcher, "--nproc", "4", "--runs", str(tmp_path))
    assert text == preview(wanted, tmp_path) and list(tmp_path.iterdir()) == []


def test_render_takes_settings_and_nodes_and_prints_json(tmp_path):
    words = [
        "--launcher",
        "slurm",
        "--nodes",
        "3",
        "--set",
        "cluster.options.partition=a3",
        "--runs",
        str(tmp_path),
    ]
    row = json.loads(lab("sft_tiny", *words, "--json"))
    assert row["launcher"] == "slurm" and row["recipe"] == "sft_tiny"
    assert "#SBATCH --nodes=3" in row["script"] and "#SBATCH --partition=a3" in row["script"]


def test_settings_are_listed_with_kind_default_and_meaning():
    rows = {row["key"]: row for row in json.loads(lab("--options", "volcano", "--json"))}
    assert rows["cluster.options.image"]["needed"] and rows["cluster.options.image"]["kind"] == "text"
    assert rows["cluster.options.kind"]["kind"] == "AscendJob or Job"
    assert rows["cluster.options.restarts"]["default"] == 3
    assert all(row["meaning"] for row in rows.values())
    assert "cluster.options.gres" in lab("--options", "slurm") and "no settings" in lab("--options", "local")


def test_render_without_a_recipe_says_what_it_needs():
    with pytest.raises(RecipeError, match="needs a recipe"):
        lab()


def test_the_short_words_are_keys_of_a_recipe():
    assert places("slurm", 2, None) == {"cluster.launcher": "slurm", "cluster.nodes": 2}
    assert places(None, None, None) == {}
