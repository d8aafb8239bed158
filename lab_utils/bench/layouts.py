"""``lab verify layouts`` and ``lab bench layout``: jobs of several ranks on this machine, one table each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lab_utils.errors import LayoutError, RunError
from lab_utils.launchers._forked import command
from lab_utils.planner.fitted import bench_recipe
from lab_utils.planner.layouts import layout_names
from lab_utils.registry import nearest


def chosen_layouts(world: int, wanted: list[str]) -> list[str]:
    """All layouts, or those wanted.

    Raises:
        LayoutError: a name that is no layout of so many ranks.
    """
    known = layout_names(world)
    for name in wanted:
        if name not in known:
            raise LayoutError(f"--layouts {name}: no layout of {world} ranks; {nearest(name, known)}.")
    return wanted or list(known)


def verify_layouts(
    world: int,
    *,
    layouts: list[str],
    optimizers: list[str],
    dtype: str = "float32",
    steps: int = 20,
    accelerator: str = "auto",
    changes: dict[str, Any] | None = None,
    planted: dict[str, Any] | None = None,
    worker: str = "lab_utils.engine.verify",
) -> list[dict[str, Any]]:
    """Rows of ``lab_utils.engine.verify``, in one job.

    Args:
        changes: of the recipe on both sides.
        planted: of the layouts' recipe alone: a difference that must be found.
        worker: a module or file that does what that module does.

    Raises:
        RunError: the job failed; the sentence ends with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "folder": folder,
            "accelerator": accelerator,
            "dtype": dtype,
            "steps": steps,
            "optimizers": optimizers,
            "layouts": chosen_layouts(world, layouts),
            "changes": changes or {},
            "planted": planted or {},
        }
        _job(world, worker, options)
        return json.loads((Path(folder) / "rows.json").read_text())


def bench_layout(
    world: int,
    *,
    layouts: list[str],
    source: str = "preset:tiny",
    optimizer: str = "adamw",
    dtype: str = "float32",
    rows: int = 16,
    row_tokens: int = 256,
    steps: int = 5,
    accelerator: str = "auto",
    follow: bool = False,
    on_row: Any = None,
) -> list[dict[str, Any]]:
    """Rows of ``layout``, ``tokens_per_s``, ``bytes_sent_per_rank``, ``peak_mib``,
    ``resident_mib``; a job of its own for each layout.

    ``follow``: another job each, for ``tensors_mib``, which a CPU has no allocator to count.
    """
    from lab_utils.models.load import load_config

    found, layers = [], load_config(source).num_hidden_layers
    for name in chosen_layouts(world, layouts):
        changes = layout_names(world)[name]
        stages = changes["parallel.pp"] * changes.get("parallel.virtual_stages", 1)
        if stages > layers and not layouts:
            continue  # of all layouts those that the model has layers for
        machine = {"cluster.accelerator": accelerator, "cluster.nproc": world}
        settings = {"model.dtype": dtype, "optim.kind": optimizer, **machine, **changes}
        recipe = bench_recipe(source, rows, row_tokens, settings)
        recipe.layout(world)  # what does not fit is said before a job starts
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "folder": folder,
                "recipe": recipe.model_dump(mode="json"),
                "warmup": 2,
                "steps": steps,
            }
            _job(world, "lab_utils.engine.bench", options)
            found.append({"layout": name, **json.loads((Path(folder) / "row.json").read_text())})
        if follow:
            with tempfile.TemporaryDirectory() as folder:
                _job(world, "lab_utils.engine.bench", {**options, "folder": folder, "follow": True})
                found[-1] |= json.loads((Path(folder) / "row.json").read_text())
        if on_row:
            on_row(found[-1])
    return found


def seconds_of(world: int, runs: list[dict[str, Any]], steps: int) -> list[float]:
    """Seconds of a step of each run, in one job in which they take turns.

    Args:
        runs: ``source``, ``rows``, ``row_tokens`` and ``layout`` of each.
    """
    recipes = []
    for run in runs:
        changes = {**layout_names(world)[run["layout"]], "cluster.nproc": world, "cluster.accelerator": "cpu"}
        recipe = bench_recipe(run["source"], run["rows"], run["row_tokens"], changes)
        recipe.layout(world)
        recipes.append(recipe.model_dump(mode="json"))
    with tempfile.TemporaryDirectory() as folder:
        options = {"folder": folder, "recipes": recipes, "warmup": 2, "steps": steps}
        _job(world, "lab_utils.engine.bench", options)
        return json.loads((Path(folder) / "row.json").read_text())["seconds"]


def shards_of(source: str, ranks: int, degrees: dict[str, int], mtp: bool) -> dict[str, Any]:
    """``stages`` (rows of ``lab_utils.engine.shards``), ``parameters`` of all ranks, ``mtp`` of them.

    Raises:
        LayoutError: degrees that don't divide.
        RunError: the process failed.
    """
    if ranks % degrees["pp"] or (ranks // degrees["pp"]) % degrees["ep"]:
        raise LayoutError(
            f"--pp {degrees['pp']} and --ep {degrees['ep']} don't divide {ranks} ranks: pp must divide them, and ep "
            "what is left for a stage."
        )
    options = {"source": source, "ranks": ranks, "parallel": degrees, "mtp": mtp}
    command = [sys.executable, "-m", "lab_utils.engine.shards", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{source} could not be cut: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _job(world: int, module: str, options: dict[str, Any]) -> None:
    """Run a module, or a file of Python, on so many ranks of this machine."""
    path = Path(options["folder"]) / "options.json"
    path.write_text(json.dumps(options))
    threads = str(max(1, (os.cpu_count() or 1) // world))
    done = subprocess.run(
        command(world, module, str(path)),
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "Error" in line or "Signal" in line]
        errors = [line for line in told if "ChildFailed" not in line]
        raise RunError(
            f"A job of {world} ranks ({module}) failed: {(errors or ['killed'])[0].strip()}; run it by itself for all "
            f"of its output: torchrun --nproc-per-node={world} -m {module} OPTIONS.json."
        )
