"""``parallel: auto``: the planner's choice of a layout, as a recipe that has it in it.

    recipe = chosen(Recipe.load("mine.yaml"))       # as it was, where it names its layout

A run directory holds the recipe with its layout: what is resumed, forked or compared is what ran.
"""

from __future__ import annotations

from typing import Any

from lab_utils.errors import LayoutError
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import Cluster, find, usual
from lab_utils.recipe import Recipe


def chosen(recipe: Recipe, cluster: Cluster | None = None, ranks: int | None = None) -> Recipe:
    """The recipe with the fastest layout that fits: its cluster section's nodes and ranks, or those given.

    Raises:
        RecipeError: the cluster is not known, or the planner doesn't know the model.
        LayoutError: the kind of the chips isn't known, or nothing fits; the message says what would.
    """
    if not recipe.parallel.auto:
        return recipe
    ranks = ranks or recipe.cluster.world_size
    if ranks == 1:  # nothing to choose, and no cluster to be known
        return recipe.with_changes({"parallel": {**recipe.parallel.model_dump(), "auto": False}})
    return recipe.with_changes(fastest(recipe, cluster or profile_of(recipe), ranks))


def fastest(recipe: Recipe, cluster: Cluster, ranks: int) -> dict[str, Any]:
    """Changes of a recipe that give it the fastest layout of so many ranks.

    Raises:
        LayoutError: none fits; what would make room.
    """
    from lab_utils.planner.plan import Plan
    from lab_utils.planner.search import search

    assumed = Assumptions()
    found = search(recipe, cluster, ranks, assumed)
    if found.best is None:
        chips = max(1, ranks // cluster.devices_per_chip)
        raise LayoutError(" ".join(Plan(recipe, cluster, chips, assumed, found).knobs()))
    return found.best.changes()


def profile_of(recipe: Recipe) -> Cluster:
    """The cluster that a recipe's job will run on.

    Raises:
        RecipeError: it is not known.
        LayoutError: neither ``cluster.profile`` nor ``cluster.accelerator`` says which.
    """
    if recipe.cluster.profile:
        return find(recipe.cluster.profile, "cluster.profile")
    kind = recipe.cluster.accelerator
    if kind == "auto":
        if recipe.cluster.launcher != "local":
            raise LayoutError(
                "parallel: auto plans for chips, and nothing says which: set cluster.profile (lab plan --clusters) or "
                "cluster.accelerator."
            )
        from lab_utils.accelerators import get_accelerator

        kind = get_accelerator(kind).name
    return find(usual(kind) or "local", "parallel: auto on cluster")
