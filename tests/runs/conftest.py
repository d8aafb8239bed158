"""A small recipe, and the stand-in worker in place of the engine's."""

import json
from pathlib import Path

import pytest

from lab_utils.recipe import DataSection, DataSource, Recipe
from lab_utils.runs import checks, provenance

HERE = Path(__file__).parent


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.parse(
        {
            "name": "trial",
            "data": DataSection(train=(DataSource(manifest="ascent-tasks-sft"),), row_tokens=64).model_dump(),
            "schedule": {"steps": 20, "batch_tokens": 256, "warmup_steps": 0, "save_every": 10},
            "cluster": {"nproc": 2, "accelerator": "cpu"},
            "tracking": {"wandb": "disabled"},
        }
    )


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Runs go to a folder of the test and are trained by the stand-in; the fixture sets what it does."""
    monkeypatch.setenv("ASCENT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ASCENT_WORKER_MODULE", "stand_in_worker")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(checks, "check_data", lambda recipe: None)
    monkeypatch.setattr(provenance, "data_hashes", lambda recipe: {})

    def behave(**options):
        monkeypatch.setenv("STAND_IN", json.dumps(options))

    behave()
    return behave
