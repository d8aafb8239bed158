"""What a launch form asks of the process beside the kernel (``_away.py``): each takes a recipe, and answers in JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lab_utils.errors import LabError
from lab_utils.recipe import Recipe

CUT = 6000  # characters of a row that are shown


def plan(recipe: Recipe) -> dict[str, Any]:
    """The estimate, whether it fits, and what to turn."""
    from dataclasses import asdict

    from lab_utils.planner.auto import chosen
    from lab_utils.planner.estimate import estimate, knobs

    recipe = chosen(recipe)
    found = estimate(recipe)
    derived = {name: getattr(found, name) for name in ("total_seconds", "device_hours", "state_gib", "fits")}
    return {"estimate": asdict(found) | derived, "knobs": knobs(recipe, found)}


def planned(recipe: Recipe, cluster: str) -> dict[str, Any]:
    """What the recipe's own layout needs and takes on a cluster, and what one change would give."""
    from lab_utils.planner.advice import advice
    from lab_utils.planner.assumptions import Assumptions
    from lab_utils.planner.auto import chosen
    from lab_utils.planner.cluster import find
    from lab_utils.planner.plan import out_of_memory
    from lab_utils.planner.search import evaluate
    from lab_utils.planner.timing import GROUPS

    where, ranks, assumed = find(cluster), recipe.cluster.world_size, Assumptions()
    recipe = chosen(recipe, where, ranks)
    found = evaluate(recipe, where, ranks, assumed)
    return found.as_dict() | {
        "name": found.name,
        "cluster": where.name,
        "room_gib": found.room_gib,
        "step_terms_s": {GROUPS[name]: value for name, value in found.time.terms.items() if value},
        "chips": ranks / where.devices_per_chip,
        "steps": recipe.schedule.steps,
        "tokens_per_step": recipe.schedule.batch_tokens,
        "why": "" if found.fits else out_of_memory(found, where, "the button above"),
        "advice": advice(found, where, assumed),
    }


def layout(recipe: Recipe, cluster: str) -> dict[str, Any]:
    """Of all layouts of the recipe's ranks on a cluster the fastest that fits, as changes of the recipe."""
    from lab_utils.planner.auto import fastest
    from lab_utils.planner.cluster import find

    return fastest(recipe, find(cluster), recipe.cluster.world_size)


def looks(recipe: Recipe) -> list[list[str]]:
    """What a launch would refuse, as far as milliseconds show it: ``[[key that it is about, sentence]]``."""
    from lab_utils.data.manifest import of_source
    from lab_utils.launchers._base import get_launcher
    from lab_utils.runs import checks
    from lab_utils.runs.directory import default_root

    each_at = {
        "data.train": lambda: checks.check_formats(recipe),
        "data.validation": lambda: [of_source(each).source(each.split) for each in recipe.data.validation],
        "model.source": lambda: checks.check_sources(recipe),
        "rollout": lambda: checks.check_rollouts(recipe),
        "cluster.launcher": lambda: get_launcher(recipe.cluster.launcher).check(recipe, default_root()),
        "cluster.nproc": lambda: recipe.cluster.launcher == "local" and checks.check_accelerator(recipe),
    }
    refused = []
    for key, look in each_at.items():
        try:
            look()
        except LabError as error:
            refused.append([key, str(error)])
    return refused


def rows(recipe: Recipe, part: str, index: int, start: int, count: int) -> dict[str, Any]:
    """Rows of a source as the model sees them; ``part``: "train" or "validation", ``index``: of the source in it."""
    from lab_utils.data.documents import encoding_of
    from lab_utils.data.manifest import of_source
    from lab_utils.data.preview import rows_as_seen

    source = getattr(recipe.data, part)[index]
    manifest = of_source(source)
    seen = rows_as_seen(manifest, source.split, encoding_of(recipe), start=start, rows=count)
    found = [
        {
            "place": row.place,
            "tokens": row.tokens,
            "with_loss": row.with_loss,
            "parts": {side: _cut(segments) for side, segments in row.parts.items()},
        }
        for row in seen
    ]
    total = None if source.families else manifest.row_count(source.split)
    return {
        "name": f"{manifest.name}:{source.split}",
        "format": manifest.format,
        "total": total,
        "rows": found,
    }


def _cut(segments: Any) -> list[tuple[str, bool, bool]]:
    """Segments up to ``CUT`` characters, and how many more there are."""
    kept, left = [], CUT
    for segment in segments:
        if left > 0:
            kept.append((segment.text[:left], segment.supervised, segment.markup))
        left -= len(segment.text)
    return kept if left >= 0 else [*kept, (f" … {-left:,} more characters", False, False)]


def checks(recipe: Recipe, root: str) -> list[dict[str, Any]]:
    """Every check before a start."""
    from dataclasses import asdict

    from lab_utils.planner.auto import chosen
    from lab_utils.runs.checklist import checklist

    recipe = chosen(recipe)
    return [asdict(check) for check in checklist(recipe, Path(root))]


def start(recipe: Recipe, root: str) -> str:
    """Launch; the path of the run."""
    from lab_utils.runs.api import launch

    if notebook := os.environ.get("JPY_SESSION_NAME"):
        os.environ.setdefault("ASCENT_NOTEBOOK", notebook)
    return str(launch(recipe, root=root).path)


QUESTIONS = {
    "plan": plan,
    "planned": planned,
    "layout": layout,
    "looks": looks,
    "rows": rows,
    "checks": checks,
    "start": start,
}
