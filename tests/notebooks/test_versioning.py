"""Notebooks under git: `make hooks` in a clone, then stripped commits and diffs that a person can read."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def notebook(rate: str, outputs: bool = False) -> nbformat.NotebookNode:
    cells = [new_markdown_cell("# Title", id="a"), new_code_cell(f"steps = 10\nlr = {rate}\n", id="b")]
    if outputs:
        cells[1].outputs = [new_output("stream", text="a secret\n")]
        cells[1].execution_count = 3
    return new_notebook(cells=cells)


def test_the_attributes_name_the_drivers_that_make_hooks_sets_up():
    attributes = [
        line.split() for line in (ROOT / ".gitattributes").read_text().splitlines() if line[:1] not in "#"
    ]
    assert attributes == [["*.ipynb", "filter=nbstripout", "diff=jupyternotebook", "merge=jupyternotebook"]]
    makefile = (ROOT / "Makefile").read_text()
    for key in ("filter.nbstripout.clean", "diff.jupyternotebook.command", "merge.jupyternotebook.driver"):
        assert f"git config {key} " in makefile


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with the project's Makefile, attributes and hooks; returns git in it."""
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))  # nobody's own settings
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in (".gitattributes", "Makefile"):
        shutil.copy(ROOT / name, folder)

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    git("init", "-q", ".")
    git("config", "user.email", "a@b.c")
    git("config", "user.name", "A")
    # What an earlier version of this target did must not stand in the way.
    subprocess.run([BIN / "nbstripout", "--install"], cwd=folder, check=True, capture_output=True)
    # The environment is this one: -o keeps make from making it anew.
    command = ["make", "-C", str(folder), "-o", f"{BIN.parent}/.installed", f"VENV={BIN.parent}", "hooks"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return git


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make") or not shutil.which("git"), reason="needs make and git")
def test_a_clone_strips_what_is_committed_and_shows_what_changed(clone, tmp_path):
    path = tmp_path / "clone" / "n.ipynb"
    nbformat.write(notebook("1e-3", outputs=True), path)
    clone("add", ".")
    clone("commit", "-qm", "one")
    assert "a secret" not in clone("show", "HEAD:n.ipynb") and "a secret" in path.read_text()
    nbformat.write(notebook("2e-3", outputs=True), path)
    shown = re.sub(r"\x1b\[\d*m", "", clone("--no-pager", "diff"))
    changed = [line.rstrip() for line in shown.splitlines() if re.match(r"[-+](?![-+])", line)]
    assert changed == ["-lr = 1e-3", "+lr = 2e-3"], "neither outputs nor names of cells"
    assert '"cell_type"' not in shown, "cells, not JSON"
    patch = clone("diff", "--no-ext-diff", "--no-textconv")
    assert '-    "lr = 1e-3\\n"' in patch or '-    "lr = 1e-3"' in patch, "and git's own where a program asks"


def test_two_versions_of_a_notebook_compare_cell_by_cell(tmp_path):
    for name, rate in (("old", "1e-3"), ("new", "2e-3")):
        nbformat.write(notebook(rate), tmp_path / f"{name}.ipynb")
    done = subprocess.run(
        [BIN / "nbdiff", "--no-color", tmp_path / "old.ipynb", tmp_path / "new.ipynb"],
        capture_output=True,
        text=True,
    )
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "-  lr = 1e-3" in lines or "-lr = 1e-3" in lines, done.stdout
    assert not any("steps" in line for line in lines if line[:1] in "+-"), "only what changed"
