"""docs/ascend.md: every command says where it is run, and those that CI runs are run here, as they stand."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "ascend.md").read_text()
BLOCKS = re.findall(r"(?:^\[(\w+)\]\n)?```\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [(where, line) for where, block in BLOCKS for line in block.strip().splitlines()]
IN_CI = [line for where, line in COMMANDS if where == "CI"]
LONG = ("lab ascend check", "lab ascend selftest")


def run(line: str, folder: Path, **variables: str) -> str:
    program, *words = shlex.split(line)
    assert program == "lab"
    done = subprocess.run(
        [sys.executable, "-m", "lab_utils.cli", *words],
        cwd=folder,
        env={**os.environ, "ASCENT_RUNS": str(folder / "runs"), **variables},
        capture_output=True,
        text=True,
        timeout=590,
    )
    # A machine may be unfit; the others must succeed.
    assert done.returncode == 0 or line.startswith("lab doctor"), (
        f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    )
    return done.stdout


def test_every_command_says_where_it_is_run():
    assert len(COMMANDS) > 15 and {where for where, _ in COMMANDS} == {"CI", "node", "login"}
    for line in IN_CI:
        assert line.startswith("lab "), line


@pytest.mark.parametrize("line", [line for line in IN_CI if not line.startswith(LONG)])
def test_a_command_of_the_page_runs(line, tmp_path):
    said = run(line, tmp_path)
    assert said.strip()
    if "--json" in line:
        json.loads(said)


@pytest.mark.slow
def test_the_check_passes_here(cann, tmp_path):
    (line,) = [line for line in IN_CI if line.startswith("lab ascend check")]
    rows = json.loads(run(line, tmp_path, ASCENT_CACHE=str(tmp_path)))
    assert len(rows) > 10 and all(row["ok"] for row in rows)
    assert all(set(row) >= {"check", "ok", "proves"} for row in rows)


@pytest.mark.slow
def test_the_selftest_passes_on_a_cpu_and_leaves_its_report(tmp_path):
    (line,) = [line for line in IN_CI if line.startswith("lab ascend selftest")]
    page = run(line, tmp_path)
    assert page == (tmp_path / "selftest.md").read_text() and "selftest: passed" in page
    report = json.loads((tmp_path / "selftest.json").read_text())
    parts = {part["name"]: part for part in report["parts"]}
    assert report["ok"] and list(parts) == ["operators", "two steps", "collectives", "burn-in"]
    assert all(row["ok"] for row in parts["operators"]["rows"])
    assert max(parts["two steps"]["rows"]["differences"].values()) == 0.0, "the same job on the same device"
    swept = parts["collectives"]["rows"]
    assert {row["collective"] for row in swept} == {"all_reduce", "all_gather", "all_to_all"}
    assert all(row["gb_s"] > 0 and row["right"] for row in swept)
    burnt = parts["burn-in"]["rows"]
    assert burnt["steps"] >= 16 and burnt["last"] < burnt["first"] and burnt["finite"]
