"""Ascent's shared helper package: the few names that a notebook needs.

    from lab_utils import Recipe, launch

    run = launch(Recipe.load("sft_tiny"))
    run.wait()
    run.metrics()

Names are resolved when they are first used, so importing the package costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Recipe": "lab_utils.recipe",
    "LabError": "lab_utils.errors",
    "launch": "lab_utils.runs.api",
    "attach": "lab_utils.runs.api",
    "finished": "lab_utils.runs.api",
    "weights_of": "lab_utils.evaluation.targets",
    "list_runs": "lab_utils.runs.api",
    "Run": "lab_utils.runs.api",
    "card": "lab_utils.runs.card",
    "LaunchForm": "lab_utils.widgets.form",
    "LiveView": "lab_utils.widgets.live",
    "RunTable": "lab_utils.widgets.table",
    "compare": "lab_utils.runs.compare",
    "curves": "lab_utils.runs.compare",
    "load_manifest": "lab_utils.data.manifest",
    "plan": "lab_utils.planner.plan",
    "estimate": "lab_utils.planner.estimate",
    "evaluate": "lab_utils.evaluation.report",
    "audit": "lab_utils.engine.audit",
    "export": "lab_utils.engine.export",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lab_utils' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
