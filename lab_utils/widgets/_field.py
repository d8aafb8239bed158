"""One key of a recipe as it stands in the form.

What stands in a field is *shown*: text for numbers, words and YAML, the value itself for choices and switches.
``Field.show`` and ``Field.read`` turn one into the other and lose nothing: ``read(show(value)) == value``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from lab_utils.errors import RecipeError

ABSENT = ""  # what an optional field's choice stands on where it says nothing


class _Missing:
    """Read from an empty field: the key is left out."""

    def __repr__(self) -> str:
        return "missing"


MISSING: Any = _Missing()
Kind = Literal["text", "integer", "number", "choice", "switch", "yaml"]


@dataclass(frozen=True, eq=False)
class Field:
    """One key of a recipe as it stands in the form.

    Attributes:
        key: dotted, as in a change of a recipe.
        variant: the member of a union that it belongs to (``objective.kind``, a launcher); empty: every one.
        kind: what stands in it.
        meaning: its description, which names the unit.
        limits: valid range, as ``> 0, < 1``; empty where any value is.
        optional: may be absent.
        default: where the recipe leaves the key out; ``MISSING``: it can't.
        choices: of a choice, in order; ``ABSENT`` among them where it is optional.
        sparse: a key of a free dictionary: left out unless the field says something.
        item_keys: of the sections of a list: what each may say.
        item_defaults: the same: values that needn't be written.
    """

    key: str
    variant: str
    kind: Kind
    meaning: str
    limits: str
    optional: bool
    default: Any
    choices: tuple[Any, ...] = ()
    sparse: bool = False
    item_keys: tuple[str, ...] = ()
    item_defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The key, told apart from that of other members of the union."""
        section, _, leaf = self.key.rpartition(".")
        return f"{section}.{self.variant}.{leaf}" if self.variant else self.key

    @property
    def empty(self) -> Any:
        """What an empty field shows."""
        return ABSENT if self.kind == "choice" else False if self.kind == "switch" else ""

    def holds(self, value: Any) -> bool:
        """Whether the value can stand in the field without loss."""
        if self.kind == "choice":
            return value != ABSENT and any(
                type(each) is type(value) and each == value for each in self.choices
            )
        return type(value) is not bool and self.read(self.show(value)) == value

    def show(self, value: Any) -> Any:
        """What stands in the field for a value of the recipe (as JSON)."""
        if value is None:
            return ABSENT
        if self.kind in ("choice", "switch"):
            return value
        if self.kind == "text" and isinstance(value, str):
            plain = value == value.strip() and value.isprintable() and value[:1] not in ("", '"')
            return value if plain else json.dumps(value)
        if self.kind == "number" and isinstance(value, float):
            short = f"{value:g}"
            return short if float(short) == value else repr(value)
        if self.kind == "yaml":
            return self._show_yaml(value)
        return str(value)

    def _show_yaml(self, value: Any) -> str:
        if not value and value == self.default:
            return ""
        if isinstance(value, list):
            return _yaml([self._said(item) for item in value])
        return _yaml(_Block(value) if isinstance(value, dict) else value)

    def _said(self, item: Any) -> Any:
        """A section of a list without what goes without saying; a plain item as it is."""
        if not isinstance(item, dict):
            return item
        of, first = self.item_defaults, next(iter(item), None)
        return _Block({k: v for k, v in item.items() if k == first or k not in of or of[k] != v})

    def read(self, shown: Any) -> Any:
        """The value that a field stands for, or ``MISSING``; what cannot be read is handed on as it is.

        Raises:
            RecipeError: text that is no YAML.
        """
        if self.kind == "choice":
            return (MISSING if self.sparse else None) if shown == ABSENT else shown
        if self.kind == "switch":
            return shown
        text = shown.strip()
        if not text:
            return None if self.optional and not self.sparse else MISSING
        if self.kind == "text":
            return _unquoted(text)
        if self.kind == "yaml":
            return self._read_yaml(shown)
        return _number(text, self.kind == "integer")

    def _read_yaml(self, text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            at = f" at line {mark.line + 1}" if mark else ""
            raise RecipeError(
                f"{self.key}: not valid YAML{at} ({getattr(error, 'problem', None)})."
            ) from None


class _Block(dict):
    """A mapping that is written on a line a key."""


class _Dumper(yaml.SafeDumper):
    """What is innermost on one line, but for blocks."""


_Dumper.add_representer(
    _Block, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), False)
)


def _yaml(value: Any) -> str:
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=2**20
    )
    return text.removesuffix("...\n").strip()


def _unquoted(text: str) -> str:
    """Text as typed; in double quotes where it has spaces around it, or is empty."""
    if text.startswith('"'):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return value if isinstance(value, str) else text
    return text


def _number(text: str, whole: bool) -> Any:
    """``3e-4``, ``1_000``, ``1e6`` as numbers; anything else as it is, for the recipe to refuse."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if whole and value.is_integer() else value
