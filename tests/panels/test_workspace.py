"""The dashboard of W&B has the panels of the layout, and is the same each time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab_utils.errors import RunError
from lab_utils.panels import workspace
from lab_utils.panels.layout import OVERVIEW, PANELS, SECTIONS
from lab_utils.telemetry.wandb import NOWHERE

SNAPSHOT = Path(__file__).parent / "workspace.json"


@pytest.fixture(scope="module")
def built() -> dict:
    return workspace.as_json(workspace.build("ascent"))


def sections(tree: dict) -> dict[str, list[dict]]:
    return {s["name"]: s["panels"] for s in tree["spec"]["section"]["panelBankConfig"]["sections"]}


def test_every_section_has_its_panels_in_order(built):
    found = sections(built)
    assert tuple(found) == SECTIONS
    titles = {name: [p["config"].get("chartTitle") for p in panels] for name, panels in found.items()}
    assert titles["Overview"] == list(OVERVIEW)
    for section in SECTIONS[1:]:
        expected = [panel.title for panel in PANELS if panel.section == section]
        assert titles[section][: len(expected)] == expected
    assert found["Rollouts"][-1]["viewType"] == "Weave" and "samples" in json.dumps(found["Rollouts"][-1])
    assert "report/base/exact_match" in found["Evaluation"][-1]["config"]["metrics"]


def test_charts_are_drawn_over_steps_as_the_layout_says(built):
    charts = {p["config"]["chartTitle"]: p["config"] for p in sections(built)["Throughput"]}
    area = charts["Step time"]
    assert (
        area["plotType"] == "stacked-area"
        and area["yAxisTitle"] == "s / step"
        and not area["smoothingWeight"]
    )
    assert area["metrics"] == list(next(p for p in PANELS if p.title == "Step time").keys)
    # W&B has no factor: a share keeps its logged unit.
    assert charts["Model FLOPs utilisation"]["yAxisTitle"] == "0–1"
    loss = next(p["config"] for p in sections(built)["Alignment"])
    assert loss["yLogScale"] is True and loss["smoothingWeight"] == workspace.SMOOTHING
    every = [
        p for panels in sections(built).values() for p in panels if p["viewType"] == "Run History Line Plot"
    ]
    assert {p["config"]["xAxis"] for p in every} == {"train/global_step"}


def test_the_layout_is_the_kept_one(built):
    assert built == workspace.as_json(workspace.build("ascent"))
    kept = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert built == kept, "if the change is meant: lab wandb workspace > tests/panels/workspace.json"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"entity": "team", "url": None}, "none is named: give --url"),
        ({"entity": "team", "url": NOWHERE}, "none is named: give --url"),
        ({"entity": None, "url": "http://127.0.0.1:11"}, "give --entity"),
        ({"entity": "team", "url": "http://127.0.0.1:11"}, "no key for http://127.0.0.1:11"),
    ],
)
def test_saving_needs_a_server_a_team_and_a_key(tmp_path, monkeypatch, arguments, said):
    for name in ("WANDB_BASE_URL", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(RunError, match=said):
        workspace.save("ascent", **arguments)


@pytest.mark.slow
def test_the_command_prints_it_and_talks_to_nobody(tmp_path, built):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    command = [sys.executable, "-m", "lab_utils.cli", "wandb", "workspace"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**kept, "HOME": str(tmp_path)}, cwd=tmp_path
    )
    assert json.loads(done.stdout) == built and done.stderr == ""
    assert list(tmp_path.iterdir()) == []
