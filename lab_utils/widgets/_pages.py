"""The pages beside the form: plan, data, script, changes, checks. Each is worked out when it is looked at.

A page is HTML made from a recipe in a thread, so that nothing waits for it; what it showed for another recipe stays,
paler, until the new one is there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as w

from lab_utils.errors import LabError
from lab_utils.recipe import Recipe
from lab_utils.widgets import _pictures as pictures
from lab_utils.widgets._away import Away, Latest
from lab_utils.widgets._chosen_cluster import ChosenCluster
from lab_utils.widgets._sheet import difference

ROWS = 3  # of data on a page
KEPT = 16  # answers of a page that are remembered


@dataclass(frozen=True)
class Shown:
    """A page's HTML, and what speaks against the recipe: ``(key, sentence)``."""

    html: str
    refused: tuple[tuple[str, str], ...] = ()


class Page:
    """One page.

    Args:
        title: on its tab.
        busy: what it says while it is worked out.
        work: HTML of a recipe; runs in a thread.
        key: what the HTML depends on.
        lock: of the form; held whenever the page changes.
        delay: seconds without another change before work begins.
        controls: widgets above the HTML.
        refused: told of every reason against the recipe that the work found; maybe in a thread.
    """

    def __init__(
        self,
        title: str,
        busy: str,
        work: Callable[[Recipe], Shown],
        key: Callable[[Recipe], Hashable],
        lock: Any,
        *,
        delay: float = 0.3,
        controls: tuple[w.Widget, ...] = (),
        refused: Callable[[str, str], None] = lambda key, sentence: None,
    ):
        self.title, self.busy, self._work, self._key, self._delay = title, busy, work, key, delay
        self._refused = refused
        self._kept: dict[Hashable, Shown] = {}
        self._latest = Latest(self._deliver, lock)
        self._asked: Hashable = None
        self.note, self.html = w.HTML(), w.HTML()
        bar = (w.HBox(controls).add_class("lab-bar"),) if controls else ()
        self.box = w.VBox((*bar, self.note, self.html)).add_class("lab-page")

    def show(self, recipe: Recipe) -> None:
        """Bring the page to a recipe; returns at once."""
        key = self._key(recipe)
        if key in self._kept:
            self._latest.drop()
            self._asked = key
            self._put(self._kept[key])  # what it shows may stand; what it refuses is said again
            return
        if key == self._asked:
            return
        self._asked = key
        self.note.value = f'<span class="lab-soft">{self.busy}</span>'
        self.html.add_class("lab-stale")
        self._latest.ask(lambda: (key, self._work(recipe)), self._delay)

    def wait(self) -> None:
        """There is no recipe to show anything of."""
        self._latest.drop()
        self._asked = None
        self.note.value = '<span class="lab-soft">This follows when the form is right again.</span>'
        self.html.add_class("lab-stale")

    def again(self, recipe: Recipe) -> None:
        """Work it out again, whatever is remembered."""
        self._kept.clear()
        self._asked = None
        self.show(recipe)

    def _deliver(self, found: Any) -> None:
        if isinstance(found, Exception):
            said = str(found) if isinstance(found, LabError) else f"{type(found).__name__}: {found}"
            self._asked = None
            self.note.value = f'<span class="lab-bad">{pictures.text(said)}</span>'
            return
        key, shown = found
        while len(self._kept) >= KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept[key] = shown
        self._put(shown)

    def _put(self, shown: Shown) -> None:
        self.note.value = ""
        self.html.value = shown.html
        self.html.remove_class("lab-stale")
        for key, sentence in shown.refused:
            self._refused(key, sentence)


class Pages:
    """All pages in tabs; the one that is open follows the form.

    Args:
        base: the recipe that changes are counted from, and its name.
        refused: called with a key and a sentence where a launch would be refused; maybe in a thread.
        take: called with changes of the recipe that a search found; in a thread.
        root: the folder of runs.
        lock: of the form, re-entrant.
    """

    def __init__(
        self,
        base: Callable[[], tuple[str, Recipe]],
        refused: Callable[[str, str], None],
        take: Callable[[dict[str, Any]], None],
        root: Callable[[], Path],
        lock: Any,
    ):
        self._base, self._take, self._root, self._lock = base, take, root, lock
        # Each has a process of its own: a long check of data must not keep the plan waiting.
        self._plans, self._looks, self._rows, self._checks = Away(), Away(), Away(), Away()
        self._recipe: Recipe | None = None
        self.source = w.Dropdown(layout=w.Layout(width="auto")).add_class("lab-grow")
        self.back, self.on = w.Button(description="‹ Back"), w.Button(description="Next ›")
        self.again = w.Button(description="Check again")
        self._start = 1
        self.source.observe(lambda _: self._turn(None), "value")
        self.back.on_click(lambda _: self._turn(-ROWS))
        self.on.on_click(lambda _: self._turn(ROWS))
        self.again.on_click(lambda _: self._check_again())
        self.chosen = ChosenCluster(self._follow, self._search, lock)
        made = (
            Page("Plan", "counting…", self._plan, self._plan_key, lock, controls=self.chosen.controls),
            Page(
                "Data",
                "reading…",
                self._data,
                self._data_key,
                lock,
                controls=(self.source, self.back, self.on),
            ),
            Page("Script", "rendering…", self._script, Recipe.to_yaml, lock),
            Page("Changes", "comparing…", self._difference, self._difference_key, lock, delay=0.0),
            Page("Preflight", "checking…", self._preflight, Recipe.to_yaml, lock, controls=(self.again,)),
        )
        self._look = Page("", "", self._looked, self._look_key, lock, refused=refused)  # has no tab
        self.pages = {page.title: page for page in made}
        self.widget = w.Tab([page.box for page in made], titles=tuple(self.pages), selected_index=0)
        self.widget.observe(lambda _: self._follow(), "selected_index")

    def show(self, recipe: Recipe | None) -> None:
        """The form has this recipe now, or none."""
        self._recipe = recipe
        if recipe is not None:
            self._offer(recipe)
            self.chosen.suggest(recipe)
        self._follow()

    def open(self, title: str) -> None:
        self.widget.selected_index = list(self.pages).index(title)

    def _follow(self) -> None:
        """Bring the open page to the recipe, and what is known to speak against it."""
        opened = list(self.pages.values())[self.widget.selected_index or 0]
        with self._lock:
            for page in (self._look, opened):
                if self._recipe is None:
                    page.wait()
                else:
                    page.show(self._recipe)

    def _offer(self, recipe: Recipe) -> None:
        """The sources of data that can be looked at."""
        named = {"train": recipe.data.train, "validation": recipe.data.validation}
        options = [
            (f"{part}: {source.manifest}, {source.split}", (part, index))
            for part, sources in named.items()
            for index, source in enumerate(sources)
        ]
        if list(self.source.options) != options:
            kept = self.source.value
            self.source.options = options
            self.source.value = kept if kept in dict(options).values() else options[0][1] if options else None

    def _turn(self, by: int | None) -> None:
        self._start = 1 if by is None else max(1, self._start + by)
        self._follow()

    def _check_again(self) -> None:
        if self._recipe is not None:
            with self._lock:
                self.pages["Preflight"].again(self._recipe)

    def _search(self) -> None:
        """The fastest layout on the chosen cluster, into the form."""
        recipe, cluster, note = self._recipe, self.chosen.name, self.pages["Plan"].note
        if recipe is None:
            return

        def found(answer: Any) -> None:
            if isinstance(answer, Exception):
                note.value = f'<span class="lab-bad">{pictures.text(answer)}</span>'
            else:
                note.value = ""
                self._take(answer)

        with self._lock:
            note.value = '<span class="lab-soft">looking at every layout…</span>'
        self.chosen.wait_for(lambda: self._plans.ask("layout", recipe, cluster=cluster), found)

    # -- what the pages depend on, and what they show; the latter in threads ---------------------------------

    def _plan_key(self, recipe: Recipe) -> Hashable:
        return recipe.hash, recipe.cluster.launcher, str(recipe.cluster.options), self.chosen.name

    def _look_key(self, recipe: Recipe) -> Hashable:
        """All that ``looks`` reads: what is typed elsewhere leaves its answer standing."""
        read = (recipe.model, recipe.data, recipe.objective, recipe.rollout, recipe.parallel, recipe.cluster)
        return *map(str, read), recipe.schedule.batch_tokens

    def _data_key(self, recipe: Recipe) -> Hashable:
        return str(recipe.data), recipe.model.tokenizer, recipe.model.encoding, self.source.value, self._start

    def _difference_key(self, recipe: Recipe) -> Hashable:
        return recipe.to_yaml(), self._base()[0]

    def _plan(self, recipe: Recipe) -> Shown:
        if self.chosen.name:
            return Shown(pictures.planned(self._plans.ask("planned", recipe, cluster=self.chosen.name)))
        return Shown(pictures.plan(self._plans.ask("plan", recipe)))

    def _looked(self, recipe: Recipe) -> Shown:
        return Shown("", tuple(map(tuple, self._looks.ask("looks", recipe))))

    def _data(self, recipe: Recipe) -> Shown:
        if self.source.value is None:
            return Shown(pictures.note("The recipe has no data."))
        part, index = self.source.value
        self._rows.interrupt()  # a set that is made or read for the first time takes its time
        found = self._rows.ask("rows", recipe, part=part, index=index, start=self._start, count=ROWS)
        return Shown(pictures.rows(found, self._start))

    def _script(self, recipe: Recipe) -> Shown:
        from lab_utils.launchers._base import preview
        from lab_utils.planner.auto import chosen

        return Shown(pictures.script(preview(chosen(recipe), self._root())))

    def _difference(self, recipe: Recipe) -> Shown:
        name, base = self._base()
        return Shown(pictures.changes(name, difference(base, recipe)))

    def _preflight(self, recipe: Recipe) -> Shown:
        self._checks.interrupt()  # they may take minutes, and were of another recipe
        return Shown(pictures.checks(self._checks.ask("checks", recipe, root=str(self._root()))))
