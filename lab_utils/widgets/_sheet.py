"""What stands in the form, without a widget: every field's text, the recipe that they make, and what is wrong.

    sheet = Sheet(Recipe.load("sft_tiny"), "sft_tiny")
    sheet.write("optim.lr", "3e-3")
    sheet.recipe                 # or RecipeError
    sheet.problems               # {field id: sentence}
    sheet.changes()              # [("optim.lr", 0.002, 0.003)]: was, is

``Sheet(recipe).recipe == recipe`` for every recipe: the form loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from lab_utils.errors import LabError, RecipeError
from lab_utils.launchers._base import options_class, options_of
from lab_utils.recipe import Recipe
from lab_utils.recipe.recipe import takes_samples
from lab_utils.runs.compare import flat
from lab_utils.widgets._field import MISSING, Field
from lab_utils.widgets._schema import Group, groups, option_fields

OPTIONS = "cluster.options"
LAUNCHER = "cluster.launcher"


class Sheet:
    """The fields of a form.

    Args:
        recipe: what they start with.
        name: how the recipe is called: a named one, or a file.
        base: what changes are counted from; absent: the recipe itself.
    """

    def __init__(self, recipe: Recipe, name: str, base: Recipe | None = None):
        self.shown: dict[str, Any] = {}
        self.load(recipe, name, base)

    def load(self, recipe: Recipe, name: str, base: Recipe | None = None) -> None:
        """Another recipe in all fields; what stood in those of other objectives stays there."""
        self.base, self.name = base or recipe, name
        tree = recipe.model_dump(mode="json")
        for group in groups():
            if group.tag:
                self.shown[group.tag.id] = tree[group.name][_leaf(group.tag)]
            for each in group.fields:
                section = tree[group.name] if group.name else tree
                mine = group.tag is None or each.variant == self.shown[group.tag.id]
                if section is not None and mine and each.key != OPTIONS:
                    self.shown[each.id] = each.show(section[_leaf(each)])
                elif each.id not in self.shown:
                    self.shown[each.id] = _untouched(each)
        self._load_options(tree["cluster"]["options"])
        self.check()

    def _load_options(self, options: dict[str, Any]) -> None:
        """The launcher's own settings into their fields; those without one, or that it can't hold, stay together."""
        rest = dict(options)
        for each in self.options():
            name = _leaf(each)
            self.shown[each.id] = each.empty
            if name in rest and each.holds(rest[name]):
                self.shown[each.id] = each.show(rest.pop(name))
        self.shown[OPTIONS] = _field_of(OPTIONS).show(rest)

    # -- fields --------------------------------------------------------------------------------------------

    def options(self) -> tuple[Field, ...]:
        """Fields of the present launcher's own settings."""
        try:
            return _options(self.shown[LAUNCHER])
        except RecipeError:
            return ()  # no such launcher: check says so

    def fields(self, group: Group) -> Iterator[Field]:
        """Fields of a section that are there now: of the present kind of objective, of the present launcher."""
        if group.name == "rollout" and not self._samples():
            return
        if group.tag:
            yield group.tag
        for each in group.fields:
            if each.key == OPTIONS:
                yield from self.options()
            # What no field holds stands in one of YAML, which is there where something does.
            if (each.key != OPTIONS or self.shown[OPTIONS]) and each.variant in ("", self._kind(group)):
                yield each

    def _kind(self, group: Group) -> Any:
        return self.shown[group.tag.id] if group.tag else ""

    def field(self, key: str) -> Field | None:
        """The field of a dotted key, or the one that holds it; None where there is none now."""
        there = {each.key: each for group in groups() for each in self.fields(group)}
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            if found := there.get(".".join(parts[:end])):
                return found
        return None

    def write(self, key: str, shown: Any) -> None:
        """Something else in the field of a key.

        Raises:
            KeyError: no such field now.
        """
        field = self.field(key)
        if field is None or field.key != key:
            raise KeyError(key)
        self.shown[field.id] = shown
        for each in self.options():
            self.shown.setdefault(each.id, each.empty)
        self.check()

    def _samples(self) -> bool:
        objective = {"kind": self.shown["objective.kind"]}
        on_policy = self.shown.get(f"objective.{objective['kind']}.on_policy")
        return takes_samples(objective if on_policy is None else objective | {"on_policy": on_policy})

    # -- the recipe ----------------------------------------------------------------------------------------

    def tree(self) -> dict[str, Any]:
        """The recipe as nested dictionaries, as far as it can be read.

        Raises:
            RecipeError: text that is no YAML.
        """
        tree: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for group in groups():
            section = tree.setdefault(group.name, {}) if group.name else tree
            for each in self.fields(group):
                value = each.read(self.shown[each.id])
                if value is not MISSING:
                    (options if each.sparse else section)[_leaf(each)] = value
        if not self._samples():
            del tree["rollout"]
        if options:
            rest = tree["cluster"].get("options", {})
            tree["cluster"]["options"] = {**rest, **options} if isinstance(rest, dict) else rest
        return tree

    def check(self) -> None:
        """Find what is wrong: values, keys that don't go together, ranks that don't divide, the launcher's settings."""
        self.problems: dict[str, str] = {}
        self.message = ""
        self._recipe: Recipe | None = None
        try:
            tree = self.tree()
        except RecipeError as error:
            self.refuse(error)
            return
        found = Recipe.problems(tree)
        for key, text in found:
            self._note(key, text)
        if found:
            return
        self._recipe = Recipe.parse(tree)
        try:
            if not self._recipe.parallel.auto:  # the planner looks for one that divides
                self._recipe.layout()
            options_of(self._recipe)
        except LabError as error:
            self.refuse(error)

    def refuse(self, error: LabError | str, key: str = "") -> None:
        """Take up a reason against the recipe that was found elsewhere; it stands until a field changes."""
        self._note(key, str(error))

    def _note(self, key: str, text: str) -> None:
        """A sentence at the field that it is about: the one at ``key``, else the first that the sentence names."""
        self.message = self.message or text
        field = self.field(key) if key else None
        for word in () if field else re.findall(r"[a-z_]+(?:\.\w+)+", text):
            field = field or self.field(word)
        self.problems.setdefault(field.id if field else "", text)

    @property
    def recipe(self) -> Recipe:
        """The recipe that the fields make.

        Raises:
            RecipeError: they make none; the form's message.
        """
        if self._recipe is None:
            raise RecipeError(self.message)
        return self._recipe

    def changes(self) -> list[tuple[str, Any, Any]]:
        """``difference`` of the fields from what they are compared with."""
        return difference(self.base, self.recipe)


def difference(base: Recipe, recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """``(key, was, is)`` of every key in which two recipes differ; ``MISSING``: not there.

    Where only one of them has a key (another kind of objective), its default is no difference.
    """
    was, now = flat(base.model_dump(mode="json")), flat(recipe.model_dump(mode="json"))
    defaults = {**_defaults(base.objective.kind), **_defaults(recipe.objective.kind)}
    found = []
    for key in dict.fromkeys([*now, *was]):
        before, after = was.get(key, MISSING), now.get(key, MISSING)
        said = after if before is MISSING else before
        if before != after and not (MISSING in (before, after) and said in (None, defaults.get(key))):
            found.append((key, before, after))
    return found


def _defaults(kind: str) -> dict[str, Any]:
    """Defaults by key, of the objective's kind."""
    return {f.key: f.default for group in groups() for f in group.fields if f.variant in ("", kind)}


@cache
def _options(launcher: str) -> tuple[Field, ...]:
    section = options_class(launcher)
    return option_fields(launcher, section) if section else ()


def _leaf(field: Field) -> str:
    return field.key.rpartition(".")[2]


def _field_of(key: str) -> Field:
    return next(each for group in groups() for each in group.fields if each.key == key)


def _untouched(field: Field) -> Any:
    return field.empty if field.default is MISSING else field.show(field.default)
