"""Model and optimizer of a run, from its recipe and the headers of its newest checkpoint; no tensor is read."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory, read_json

_RANGE = re.compile(r"\[(\d+):(\d+)\]$")


def newest_checkpoint(run: RunDirectory) -> Path | None:
    found = run.checkpoints()
    return found[-1] if found else None


def model(run: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """Where weights came from and what they are; parameters are counted in the newest checkpoint."""
    checkpoint = newest_checkpoint(run)
    shapes = trained_shapes(checkpoint) if checkpoint else []
    config = read_json(checkpoint / "model" / "config.json") if checkpoint else {}
    told = (
        ("architecture", (config.get("architectures") or [None])[0]),
        ("layers", config.get("num_hidden_layers")),
        ("hidden_size", config.get("hidden_size")),
        ("routed_experts", config.get("n_routed_experts")),
        ("experts_per_token", config.get("num_experts_per_tok")),
        ("vocabulary", config.get("vocab_size")),
    )
    source = Path(recipe.model.source)
    parent = source.parents[2] if source.name == "model" and len(source.parents) > 2 else None
    return {
        **recipe.model.model_dump(mode="json"),
        "from_run": parent.name if parent and (parent / "recipe.yaml").is_file() else None,
        "parameters": sum(math.prod(shape) for _, shape in shapes) or None,
        "tensors": len(shapes) or None,
        "config": {key: value for key, value in told if value is not None},
        "checkpoint": checkpoint.name if checkpoint else None,
        "checkpoint_sha256": _weights_hash(checkpoint) if checkpoint else None,
    }


def _weights_hash(checkpoint: Path) -> dict[str, str]:
    return {
        name.removeprefix("model/"): entry["sha256"]
        for name, entry in read_json(checkpoint / "MANIFEST.json").items()
        if name.endswith(".safetensors") and name.startswith("model/")
    }


def trained_shapes(checkpoint: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that the optimizer keeps, from the headers of its files alone."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted((checkpoint / "optimizer").glob("*.safetensors")):
        for key, entry in _header(file).items():
            name, _, kind = key.rpartition("/")
            if kind != "master":
                continue
            shape = tuple(entry["shape"])
            if match := _RANGE.search(name):  # some rows of a tensor that is spread over ranks
                name = name[: match.start()]
                shape = (max(int(match[2]), *(found.get(name) or (0,))[:1]), *shape[1:])
            found[name] = shape
    return sorted(found.items())


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {key: entry for key, entry in header.items() if key != "__metadata__"}


def optimizer(run: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """Every setting, the schedule, and which tensors went to which optimizer."""
    from lab_utils.optim.table import assignment_table

    settings = recipe.optim.model_dump(mode="json")
    if recipe.optim.kind == "adamw":
        settings = {key: value for key, value in settings.items() if key not in ("momentum", "update_rms")}
    checkpoint = newest_checkpoint(run)
    groups, table = None, []
    if checkpoint and (shapes := trained_shapes(checkpoint)):
        config = SimpleNamespace(**read_json(checkpoint / "model" / "config.json"))
        table = assignment_table(shapes, config, recipe.optim)
        tensors = {name: kind for name, kind in _algorithms(shapes, config, recipe)}
        groups = {
            kind: {
                "tensors": sum(each == kind for each in tensors.values()),
                "matrices": sum(row["count"] for row in table if row["algorithm"] == kind)
                if kind == "muon"
                else None,
                "parameters": sum(row["parameters"] for row in table if row["algorithm"] == kind),
            }
            for kind in dict.fromkeys(tensors.values())
        }
    schedule = recipe.schedule.model_dump(mode="json")
    keys = (
        "steps",
        "warmup_steps",
        "shape",
        "decay_fraction",
        "final_lr_ratio",
        "batch_tokens",
        "max_skipped",
    )
    if recipe.schedule.shape != "wsd":
        schedule.pop("decay_fraction")
    return {
        **settings,
        "schedule": {key: schedule[key] for key in keys if key in schedule},
        "groups": groups,
        "table": table,
    }


def _algorithms(shapes: list, config: Any, recipe: Recipe) -> list[tuple[str, str]]:
    from lab_utils.optim.groups import rule

    return [(name, rule(name, shape, config, recipe.optim)[0]) for name, shape in shapes]
