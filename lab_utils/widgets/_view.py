"""The launch form's widgets: what a person changes goes to the sheet, what the sheet says comes back.

Sections are filled when they are first opened: a form of a hundred fields is there as fast as one of ten. No handler
raises (the notebook would lose it): each writes to the status line.
"""

from __future__ import annotations

import html
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from lab_utils.errors import RecipeError
from lab_utils.recipe import Recipe
from lab_utils.registry import members
from lab_utils.runs.directory import write_atomic
from lab_utils.widgets._field import Field
from lab_utils.widgets._guard import guarded
from lab_utils.widgets._job import Job
from lab_utils.widgets._pages import Pages
from lab_utils.widgets._picker import Picker
from lab_utils.widgets._row import Row, fill, shared
from lab_utils.widgets._schema import ESSENTIAL, Group, groups
from lab_utils.widgets._sheet import LAUNCHER, OPTIONS, Sheet
from lab_utils.widgets._style import STYLE

if TYPE_CHECKING:
    from lab_utils.runs.api import Run
    from lab_utils.widgets.form import LaunchForm
    from lab_utils.widgets.live import LiveView


class FormView:
    """Widgets over a sheet.

    Args:
        form: gets ``run`` when one is launched; says where runs live.
        sheet: what stands in the fields.
    """

    def __init__(self, form: LaunchForm, sheet: Sheet):
        self._form, self._sheet = form, sheet
        self._before: tuple[dict[str, Any], Recipe, str] | None = None
        self._rows: dict[str, Row] = {}
        self._common = shared()
        self.job = Job(self._launched)
        self.live: LiveView | None = (
            None  # held here: a view that nobody holds is no longer brought up to date
        )
        self._overwrite: str | None = None
        self._led_to: str | None = None  # the mistake whose section was opened last
        self._changed: set[str] = set()  # keys that differ, as of the last valid recipe
        self._lock = threading.RLock()
        base = lambda: (sheet.name, sheet.base)  # noqa: E731
        self.pages = Pages(base, self._refused, self._take, lambda: form.root, self._lock)
        self._build()
        self.refresh()

    # -- building ------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self.launch = w.Button(description="Launch", button_style="primary", icon="play")
        self.undo = w.Button(description="Undo", tooltip="Back to the recipe before this one", disabled=True)
        self.status = w.HTML().add_class("lab-grow")
        self.path = w.Text(placeholder="recipe.yaml", layout=w.Layout(width="auto")).add_class("lab-grow")
        self.load_file = w.Button(description="Load", tooltip="Read the YAML file into the form")
        self.save = w.Button(description="Save as", tooltip="Write the recipe to the YAML file")
        self.picker = Picker(self._pick, self._sheet.name)
        self.essentials = w.Box().add_class("lab-grid")
        self._sections = {
            group.name: w.Box().add_class("lab-grid").add_class("lab-folded") for group in groups()
        }
        self.accordion = w.Accordion()
        self.below = w.VBox().add_class("lab-below")
        self.launch.on_click(lambda _: self._launch())
        self.undo.on_click(lambda _: self._undo())
        self.load_file.on_click(lambda _: self._load())
        self.save.on_click(lambda _: self._save())
        self.accordion.observe(lambda _: self.refresh(), "selected_index")
        self.path.observe(lambda _: self._offer_save(), "value")
        left = w.VBox((self.picker.widget, self.essentials, self.accordion))
        right = w.VBox(
            (
                w.HBox((self.launch, self.undo, self.status)).add_class("lab-bar"),
                self.pages.widget,
                w.HBox((self.path, self.load_file, self.save)).add_class("lab-bar"),
            )
        )
        columns = w.Box((left, right)).add_class("lab-columns")
        self.widget = w.VBox((w.HTML(STYLE, layout=w.Layout(display="none")), columns, self.below))
        self.widget.add_class("lab-form")

    def row(self, key: str) -> Row:
        """The field of a key, which need not be on show.

        Raises:
            RecipeError: there is none now.
        """
        field = self._sheet.field(key)
        if field is None or field.key != key:
            raise RecipeError(f"The form has no field '{key}' now: see form.recipe for its keys.")
        return self._row(field)

    def _row(self, field: Field) -> Row:
        if field.id not in self._rows:
            known = tuple(members("lab_utils.launchers")) if field.key == LAUNCHER else ()
            self._rows[field.id] = Row(
                field,
                self._sheet.shown[field.id],
                self._typed,
                self._common,
                known=known,
                whole=field.key in ESSENTIAL,
            )
            self._bring(self._rows[field.id], set())
        return self._rows[field.id]

    # -- showing -------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring all widgets that are on show to the sheet."""
        with self._lock:
            self._sheet_to_widgets()

    def _sheet_to_widgets(self) -> None:
        sheet = self._sheet
        try:
            recipe: Recipe | None = sheet.recipe
            changed = {key for key, _, _ in sheet.changes()}
        except RecipeError:
            recipe, changed = None, self._changed
        self._changed = changed
        there = {group: list(sheet.fields(group)) for group in groups()}
        essential = {
            field.key: field for fields in there.values() for field in fields if field.key in ESSENTIAL
        }
        fill(self.essentials, [self._row(essential[key]) for key in ESSENTIAL if key in essential])
        folded = {g: [f for f in fields if f.key not in ESSENTIAL] for g, fields in there.items()}
        self._fold({group: fields for group, fields in folded.items() if fields}, changed)
        for row in self._rows.values():
            self._bring(row, changed)
        self.launch.disabled = bool(sheet.message) or self.job.busy
        self._report(len(changed))
        self.pages.show(recipe)

    def _bring(self, row: Row, changed: set[str]) -> None:
        field = row.field
        within = any(key.startswith(f"{field.key}.") for key in changed) and field.key != OPTIONS
        row.update(
            self._sheet.shown[field.id],
            self._sheet.problems.get(field.id, ""),
            field.key in changed or within,
        )

    def _fold(self, sections: dict[Group, list[Field]], changed: set[str]) -> None:
        """The accordion: a section with something wrong says so, and opens where nothing else on show is wrong."""
        wrong = self._sheet.problems
        boxes = tuple(self._sections[group.name] for group in sections)
        if self.accordion.children != boxes:
            kept = self.accordion.selected_index
            opened = self.accordion.children[kept] if kept is not None else None
            self.accordion.children = boxes
            self.accordion.selected_index = boxes.index(opened) if opened in boxes else None
        self.accordion.titles = tuple(
            _title(group, sum(f.key in changed for f in fields), any(f.id in wrong for f in fields))
            for group, fields in sections.items()
        )
        first = next(iter(wrong), None)
        holder = [any(f.id == first for f in fields) for fields in sections.values()]
        if first != self._led_to and any(holder):  # once: a person may want to look elsewhere first
            self.accordion.selected_index = holder.index(True)
        self._led_to = first
        if (index := self.accordion.selected_index) is not None:
            group, fields = list(sections.items())[index]
            fill(self._sections[group.name], [self._row(field) for field in fields])

    def _report(self, changes: int) -> None:
        sheet = self._sheet
        if sheet.message:
            self.say(sheet.message, bad=True)
            return
        differs = f"{changes} change{'s' if changes != 1 else ''} to {sheet.name}" if changes else sheet.name
        self.say(f"{differs} · hash {sheet.recipe.hash[:12]}")

    def say(self, sentence: str, bad: bool = False) -> None:
        """The status line."""
        self.status.value = f'<span class="{"lab-bad" if bad else "lab-soft"}">{html.escape(sentence)}</span>'

    # -- what a person does --------------------------------------------------------------------------------

    @guarded
    def _typed(self, field: Field, shown: Any) -> None:
        with self._lock:
            self._sheet.write(field.key, shown)
            self._sheet_to_widgets()

    def _refused(self, key: str, sentence: str) -> None:
        """A launch would be refused; shown at the field like any other mistake."""
        with self._lock:
            if self._sheet.message:
                return
            self._sheet.refuse(sentence, key)
            self._sheet_to_widgets()

    @guarded
    def _pick(self, source: str) -> None:
        self._replace(Recipe.load(source), source)

    @guarded
    def _load(self) -> None:
        if not self.path.value.strip():
            raise RecipeError("Give the path of a YAML file to load.")
        self._replace(Recipe.load(Path(self.path.value.strip()).expanduser()), self.path.value.strip())

    @guarded
    def _take(self, changes: dict[str, Any]) -> None:
        """What a search found, into the fields."""
        self._replace(self._sheet.recipe.with_changes(changes), self._sheet.name, self._sheet.base)

    def _replace(self, recipe: Recipe, name: str, base: Recipe | None = None) -> None:
        with self._lock:
            self._before = (dict(self._sheet.shown), self._sheet.base, self._sheet.name)
            self._sheet.load(recipe, name, base)
            self.undo.disabled = False
            self._sheet_to_widgets()
            self.picker.show(name)

    @guarded
    def _undo(self) -> None:
        if self._before is not None:
            with self._lock:
                self._sheet.shown, self._sheet.base, self._sheet.name = self._before
                self._before = None
                self.undo.disabled = True
                self._sheet.check()
                self._sheet_to_widgets()
                self.picker.show(self._sheet.name)

    @guarded
    def _save(self) -> None:
        text = self.path.value.strip()
        if not text:
            raise RecipeError("Give the path of a YAML file to save the recipe in.")
        path = Path(text if text.endswith((".yaml", ".yml")) else f"{text}.yaml").expanduser()
        if path.exists() and self._overwrite != str(path):
            self._overwrite, self.save.description = str(path), "Overwrite"
            raise RecipeError(
                f"{path} is there already: press Overwrite to replace it, or give another path."
            )
        self._offer_save()
        try:
            write_atomic(path, self._sheet.recipe.to_yaml())
        except OSError as error:
            raise RecipeError(
                f"{path} cannot be written ({error.strerror or error}): give another path."
            ) from None
        self.picker.show(self._sheet.name)
        self.say(f"Saved as {path}: lab run {path}")

    def _offer_save(self) -> None:
        self._overwrite, self.save.description = None, "Save as"

    @guarded
    def _launch(self) -> None:
        if not self.job.busy and not self._sheet.message:
            self.launch.disabled = True
            self.say("Checking and launching…")
            self.job.start(self._sheet.recipe, self._form.root)

    @guarded
    def _launched(self, run: Run | None, refusal: str) -> None:
        """In a thread: what came of it."""
        from lab_utils.widgets.live import LiveView

        with self._lock:
            self.launch.disabled = bool(self._sheet.message)
            self.say(f"Launched {run.name}" if run else refusal, bad=run is None)
            if run is not None:
                self._form.run = run
                if self.live is not None:
                    self.live.close()
                self.live = LiveView(run)
                self.below.children = (self.live.widget,)


def _title(group: Group, changed: int, wrong: bool) -> str:
    return f"{'⚠ ' if wrong else ''}{group.title}{f' · {changed} changed' if changed else ''}"
