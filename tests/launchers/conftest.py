"""A recipe and a run directory that nothing has started yet."""

import pytest

from lab_utils.recipe import Recipe
from lab_utils.runs.directory import create


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load("sft_tiny").with_changes({"cluster.accelerator": "cpu", "cluster.nproc": 2})


@pytest.fixture
def run_dir(tmp_path, recipe):
    return create(recipe, tmp_path / "runs of somebody")  # a path with a space, as people have them
