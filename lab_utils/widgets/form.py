"""The launch form: a recipe in fields, what it will cost, the script that would run, and a Launch button.

    form = LaunchForm("sft_tiny", changes={"schedule.steps": 200})
    form                      # in a notebook: shows itself
    run = form.launched()     # the next cell: the run that Launch started; headless: launches now

The form is generated from the recipe's own schema, and it is the recipe: ``LaunchForm(recipe).recipe == recipe``.
Without anybody in front of it (papermill, a script) no widget is made, and the same two cells launch the same recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.errors import RecipeError
from lab_utils.recipe import Recipe
from lab_utils.registry import members
from lab_utils.runs.directory import default_root
from lab_utils.widgets._place import headless
from lab_utils.widgets._sheet import Sheet

if TYPE_CHECKING:
    import ipywidgets as w

    from lab_utils.runs.api import Run

RECIPES = "lab_utils.recipes"
PRESS = "Press Launch above, then run the cells from here on."


class NotLaunched(Exception):
    """Ends a cell, and with it "Run All", where a person has yet to press Launch; shown as its sentence alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class LaunchForm:
    """A form over one recipe.

    Args:
        recipe: a recipe, the name of one, or a YAML file.
        changes: dotted keys that are set beforehand, as for ``Recipe.with_changes``.
        root: the folder of runs; absent: ``ASCENT_RUNS``, else ``./runs``.

    Raises:
        RecipeError: there is no such recipe, or a change is none.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        changes: dict[str, Any] | None = None,
        *,
        root: str | Path | None = None,
    ):
        name = recipe.name if isinstance(recipe, Recipe) else str(recipe)
        if not isinstance(recipe, Recipe):
            base = recipe = Recipe.load(recipe)
        else:
            base = Recipe.load(name) if name in members(RECIPES) else recipe
        self._sheet = Sheet(recipe.with_changes(changes) if changes else recipe, name, base)
        self._root = root
        self._view: Any = None
        self.run: Run | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe as it stands in the form.

        Raises:
            RecipeError: it isn't one now; the form's message.
        """
        return self._sheet.recipe

    @property
    def root(self) -> Path:
        """The folder of runs."""
        return Path(self._root) if self._root is not None else default_root()

    def launched(self) -> Run:
        """The run that the Launch button started; where nobody can press it, the recipe is launched now.

        Raises:
            NotLaunched: the button has not been pressed, or the launch was refused.
            LabError: headless: the recipe is none, or its launch was refused.
        """
        if headless():
            if self.run is None:
                from lab_utils.runs.api import launch

                self.run = launch(self.recipe, root=self.root)
                print(self.run.path)
            return self.run
        refusal = self._view.job.settle() if self._view is not None else ""
        if self.run is None:
            raise NotLaunched(refusal or PRESS)
        return self.run

    # -- as a widget ---------------------------------------------------------------------------------------

    @property
    def view(self) -> Any:
        """The form's widgets, made when they are first wanted; see ``_view.FormView``."""
        if self._view is None:
            from lab_utils.widgets._view import FormView

            self._view = FormView(self, self._sheet)
        return self._view

    @property
    def widget(self) -> w.VBox:
        """What a notebook shows."""
        return self.view.widget

    def field(self, key: str) -> w.DOMWidget:
        """The input of a dotted key: ``form.field("optim.lr").value = "3e-4"``.

        Raises:
            RecipeError: the form has no such field now.
        """
        return self.view.row(key).input

    def __repr__(self) -> str:
        try:
            said = f"hash {self.recipe.hash[:12]}"
        except RecipeError as error:
            said = str(error)
        return f"<LaunchForm {self._sheet.name}: {said}>"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if headless():
            changes = [f"{key}: {was} → {now}" for key, was, now in self._sheet.changes()]
            return {"text/plain": "\n".join([repr(self), *changes])}
        return self.widget._repr_mimebundle_(**options)
