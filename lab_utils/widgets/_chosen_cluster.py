"""Whose chips the plan beside the form counts, and the button that looks for a layout on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from lab_utils.planner.cluster import known, usual
from lab_utils.recipe import Recipe
from lab_utils.widgets._away import Latest

HERE = "this machine"


class ChosenCluster:
    """Two controls. Until a person chooses, the cluster is the usual one of the recipe's accelerator.

    Args:
        changed: called when another cluster is chosen.
        search: called when the button is pressed.
        lock: of the form, re-entrant.
    """

    def __init__(self, changed: Callable[[], None], search: Callable[[], None], lock: Any):
        self._changed, self._by_hand, self._suggesting = changed, False, False
        self._latest, self._done = Latest(self._deliver, lock), lambda answer: None
        self.choice = w.Dropdown(options=[(HERE, ""), *((name, name) for name in known())])
        self.choice.tooltip = "Whose chips the plan counts"
        self.search = w.Button(description="Find the fastest layout", disabled=True)
        self.search.tooltip = (
            "Looks at every layout of so many chips, and puts the fastest that fits into the form"
        )
        self.choice.observe(lambda _: self._chosen(), "value")
        self.search.on_click(lambda _: search())

    @property
    def controls(self) -> tuple[w.Widget, ...]:
        return self.choice, self.search

    @property
    def name(self) -> str:
        """The cluster, or "" for this machine."""
        return self.choice.value

    def suggest(self, recipe: Recipe) -> None:
        """Follow the recipe's accelerator, where nobody has chosen."""
        if not self._by_hand:
            self._suggesting = True
            self.choice.value = usual(recipe.cluster.accelerator) or ""
            self._suggesting = False

    def wait_for(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Work in a thread, the button off until it is done; ``done`` takes what it returned or raised."""
        self.search.disabled, self._done = True, done
        self._latest.ask(work)

    def _chosen(self) -> None:
        self.search.disabled = not self.name
        if not self._suggesting:
            self._by_hand = True
            self._changed()

    def _deliver(self, answer: Any) -> None:
        self.search.disabled = not self.name
        self._done(answer)
