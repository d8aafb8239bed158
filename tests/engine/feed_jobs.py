"""Launches of real runs for tests of feeds; ``feed_runs.py`` is what the ranks do."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lab_utils.data.add import add
from lab_utils.data.manifest import load_manifest
from lab_utils.launchers._forked import command
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory

BASE: dict[str, Any] = {
    "name": "feeds",
    "model": {"source": "base:tiny"},
    "optim": {"lr": 3e-4},
    "tracking": {"wandb": "disabled"},
    "cluster": {"nproc": 1, "threads": 1, "accelerator": "cpu"},
}


def begun(root: Path, trees: dict[str, dict[str, Any]], ranks: int = 1) -> subprocess.Popen:
    """The runs of these recipes on their way, in a process group of their own; ``name=earlier`` goes on from another
    run's checkpoint. A folder that is there already is gone on with."""
    for key, tree in trees.items():
        folder = root / key.partition("=")[0]
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        recipe = Recipe.parse({**BASE, **tree}).with_changes({"cluster.nproc": ranks})
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        RunDirectory(folder).write_status(state="created")
    return subprocess.Popen(
        command(ranks, str(Path(__file__).with_name("feed_runs.py")), str(root), *trees),
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "ASCENT_CACHE": str(root.parent / "cache"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def worked(root: Path, trees: dict[str, dict[str, Any]], ranks: int = 1) -> dict[str, RunDirectory]:
    """The same runs to their ends, by name."""
    process = begun(root, trees, ranks)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-6000:]
    return {name: RunDirectory(root / name) for name in (key.partition("=")[0] for key in trees)}


def lines(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def few(folder: Path, manifest: str, rows: int) -> dict[str, str]:
    """A source of the first rows of a shipped set, one of each family or so."""
    path = folder / f"{manifest}.jsonl"
    chosen = islice(load_manifest(manifest).rows("validation"), rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return {"manifest": str(add(path, folder=folder).path)}


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    """What a run's newest checkpoint holds."""
    found: dict[str, torch.Tensor] = {}
    for path in (run.checkpoints()[-1] / "model").glob("*.safetensors"):
        found |= load_file(path)
    return found
