"""50_runs over runs of a stand-in worker: what it shows, resumes and forks is there afterwards."""

import json
from pathlib import Path

import pytest

from lab_utils.panels import notebooks
from lab_utils.recipe import Recipe
from lab_utils.runs.api import Run, launch, list_runs

STAND_IN = Path(__file__).parents[1] / "runs"


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[Run]:
    """Two runs, of which the second was stopped on its way."""
    monkeypatch.setenv("ASCENT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ASCENT_WORKER_MODULE", "stand_in_worker")
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    recipe = Recipe.load("sft_tiny").with_changes(
        {"schedule.steps": 30, "cluster.nproc": 1, "cluster.accelerator": "cpu", "tracking.wandb": "disabled"}
    )
    monkeypatch.setenv("STAND_IN", json.dumps({"seconds": 0.001}))
    whole = launch(recipe).wait(progress=False)
    monkeypatch.setenv("STAND_IN", json.dumps({"seconds": 0.5}))
    stopped = launch(recipe.with_changes({"optim.lr": 5e-4}))
    while stopped.status["step"] < 2:
        pass
    stopped.stop()
    monkeypatch.setenv("STAND_IN", json.dumps({"seconds": 0.001}))
    return [whole, stopped]


@pytest.mark.slow
def test_runs_are_compared_resumed_and_forked(runs):
    whole, stopped = runs
    assert stopped.state == "stopped"
    parameters = {"resume": stopped.name, "fork": whole.name, "changes": {"optim.lr": 0.25}}
    done = notebooks.execute("50_runs", parameters, root=whole.path.parent, progress=False)
    assert stopped.state == "succeeded" and stopped.metrics().index[-1] == 30
    newest = list_runs()[0]
    assert newest.name not in (whole.name, stopped.name)
    assert newest.recipe.optim.lr == 0.25 and newest.state == "succeeded"
    text = Path(done["notebook"]).read_text()
    assert "image/png" in text and "optim.lr: 0.0005 → 0.002" in text and stopped.name in text
