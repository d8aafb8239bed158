"""Runs beside one another: settings that differ, last metrics, answers; and their curves.

compare([attach("sft_tiny-…"), attach("last")])      # a row a run
curves(runs, "eval/loss")                            # a column a run, indexed by step
recipe_diff(a.recipe, b.recipe)                      # [("optim.lr", 0.002, 0.001)]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lab_utils.recipe import Recipe
from lab_utils.runs.directory import read_json

if TYPE_CHECKING:
    import pandas as pd

    from lab_utils.runs.api import Run

LAST = ("train/loss", "eval/loss", "train/num_tokens", "perf/tokens_per_s", "perf/mfu")


def recipe_diff(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """``(dotted key, in a, in b)`` of every setting in which two recipes differ; None where one has no such key."""
    left, right = flat(a.model_dump(mode="json")), flat(b.model_dump(mode="json"))
    keys = dict.fromkeys([*left, *right])
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def settings(recipes: dict[str, Recipe]) -> dict[str, dict[str, Any]]:
    """By dotted key the value in each of several recipes, of those keys that are not the same in all."""
    trees = {name: flat(recipe.model_dump(mode="json")) for name, recipe in recipes.items()}
    keys = dict.fromkeys(key for tree in trees.values() for key in tree)
    found = {key: {name: tree.get(key) for name, tree in trees.items()} for key in keys}
    return {
        key: row for key, row in found.items() if any(v != next(iter(row.values())) for v in row.values())
    }


def compare(runs: Sequence[Run]) -> pd.DataFrame:
    """A row a run: state, settings that differ, the last values of the usual metrics, exact match before and after.

    Raises:
        RunError: a run without a readable recipe.
    """
    import pandas as pd

    differing = settings({run.name: run.recipe for run in runs})
    rows = {}
    for run in runs:
        summary = run.summary()
        row: dict[str, Any] = {"state": summary["state"], "step": summary["step"]}
        row |= {key: values[run.name] for key, values in differing.items()}
        row |= {key: number(summary["metrics"].get(key)) for key in LAST}
        row |= exact_match(run)
        rows[run.name] = row
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index.name = "run"
    return frame.dropna(axis="columns", how="all")


def curves(runs: Sequence[Run], key: str) -> pd.DataFrame:
    """One metric of several runs: a column a run that logged it, indexed by step."""
    import pandas as pd

    found = {run.name: run.metrics() for run in runs}
    return pd.DataFrame({name: frame[key].dropna() for name, frame in found.items() if key in frame})


def exact_match(run: Run) -> dict[str, float]:
    """Share of held-out questions answered exactly, after and before, where they were asked (``report.json``)."""
    report = read_json(run.path / "report.json")
    found = {}
    for name, part in (("exact match", report), ("exact match before", report.get("base") or {})):
        value = (part.get("exact_match") or {}).get("value")
        if value is not None:
            found[name] = float(value)
    return found


def number(value: Any) -> float | None:
    """A logged value; NaN and infinities are text in JSON."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; lists are values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
