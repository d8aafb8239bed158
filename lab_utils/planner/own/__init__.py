"""Our own runs, one YAML file a machine: its figures as a cluster, and what was measured of runs that didn't give them.

Made by ``lab bench plan --write FILE``; each file here stands in ``docs/calibration.md`` with all of its runs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

QUANTITIES = {
    "seconds": "s a step",
    "tensors_mib": "MiB of tensors at the peak",
    "peak_mib": "MiB of the process",
}


@cache
def machines() -> tuple[dict[str, Any], ...]:
    """``machine``, ``cluster`` and ``runs`` of every file."""
    paths = sorted(Path(__file__).parent.glob("*.yaml"))
    return tuple(yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths)


def predicted(cluster: dict[str, Any], run: dict[str, Any]) -> dict[str, float]:
    """Of a run on the fullest or slowest rank, by the names of ``QUANTITIES``; experts are taken to be even.

    The machine is taken to be as fast as the two steps beside the run say.
    """
    from lab_utils.planner.assumptions import Assumptions
    from lab_utils.planner.cluster import Cluster
    from lab_utils.planner.fitted import fitted_on, recipe_of, sustained
    from lab_utils.planner.layouts import layout_names
    from lab_utils.planner.memory import stage_memory
    from lab_utils.planner.search import evaluate

    ranks = run["ranks"]
    cluster = sustained(
        cluster, [{**s, "seconds": t} for s, t in zip(fitted_on(ranks), run["beside"], strict=True)]
    )
    recipe = recipe_of(run, layout_names(ranks)[run["layout"]])
    found = evaluate(recipe, Cluster.model_validate(cluster), ranks, Assumptions(imbalance=1.0))
    return {
        "seconds": round(found.time.seconds, 4),
        "tensors_mib": round(1024 * max(stage.seen_by_twin for stage in stage_memory(recipe, ranks)), 1),
        "peak_mib": round(1024 * found.peak_gib, 1),
    }
