"""Weights to start from have many names: runs, checkpoints, folders, sources."""

import pytest

from lab_utils.errors import RunError
from lab_utils.evaluation.targets import weights_of
from lab_utils.recipe import Recipe
from lab_utils.runs.api import Run
from lab_utils.runs.directory import create


def test_weights_to_start_from_are_named_in_many_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCENT_RUNS", str(tmp_path))
    run = Run(create(Recipe.load("sft_tiny"), tmp_path))
    with pytest.raises(RunError, match="no complete checkpoint"):
        weights_of(run)
    for step in ("step-000010", "step-000020"):
        (run.path / "checkpoints" / step / "model").mkdir(parents=True)
        (run.path / "checkpoints" / step / "COMPLETE").touch()
    for name in (run, run.name, run.path, "last", "sft_tiny"):
        assert weights_of(name) == str(run.weights)
    earlier = run.path / "checkpoints" / "step-000010"
    assert weights_of(earlier) == str(earlier / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    for source in ("base:tiny", "hf:org/name", str(tmp_path / "model")):
        assert weights_of(source) == source
    with pytest.raises(RunError):
        weights_of("nobody")
