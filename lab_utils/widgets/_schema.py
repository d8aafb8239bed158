"""The fields of the form, from the recipe's own JSON schema: a key added to a recipe appears by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from lab_utils.recipe import Recipe
from lab_utils.recipe.base import Section
from lab_utils.widgets._field import ABSENT, MISSING, Field, Kind

# What nearly every run sets, in the order of the form; everything else is folded by section.
ESSENTIAL = (
    "model.source",
    "data.train",
    "objective.kind",
    "objective.loss",
    "schedule.steps",
    "schedule.batch_tokens",
    "optim.lr",
    "cluster.launcher",
    "cluster.nodes",
    "cluster.nproc",
)
TITLES = {
    "": "Run",
    "optim": "Optimizer",
    "schedule": "Schedule and checkpoints",
    "tracking": "Tracking and W&B",
}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True, eq=False)
class Group:
    """A section of the recipe.

    Attributes:
        name: its key; empty: keys of the recipe itself.
        fields: of every variant.
        tag: of a union: the field that says which member it is.
    """

    name: str
    fields: tuple[Field, ...]
    tag: Field | None = None

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name.capitalize())


@cache
def groups() -> tuple[Group, ...]:
    """Sections of a recipe and their fields, in the order of the recipe."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    loose, sections = [], []
    for name, node in schema["properties"].items():
        required = name in schema["required"]
        if mapping := node.get("discriminator", {}).get("mapping"):
            kinds = {reference: kind for kind, reference in mapping.items()}
            members = {kinds[each["$ref"]]: _section(each, definitions) for each in node["oneOf"]}
            sections.append(_union(name, node["discriminator"]["propertyName"], members, definitions))
        elif (section := _section(node, definitions)) is not None:
            sections.append(Group(name, tuple(_fields(section, definitions, f"{name}."))))
        else:
            loose.append(_field(name, node, required, definitions))
    return (Group("", tuple(loose)), *sections)


def option_fields(launcher: str, options: type[Section]) -> tuple[Field, ...]:
    """Fields of a launcher's own settings: none of them need be given."""
    schema = options.model_json_schema()
    return tuple(_fields(schema, schema.get("$defs", {}), "cluster.options.", variant=launcher, sparse=True))


def _union(name: str, tag: str, members: dict[str, Any], definitions: dict[str, Any]) -> Group:
    fields = [
        each
        for kind, section in members.items()
        for each in _fields(section, definitions, f"{name}.", kind)
        if each.key != f"{name}.{tag}"
    ]
    kinds = Field(
        f"{name}.{tag}",
        "",
        "choice",
        f"Kind of {name}: each has fields of its own.",
        "",
        False,
        MISSING,
        tuple(members),
    )
    return Group(name, tuple(fields), kinds)


def _fields(
    section: dict[str, Any],
    definitions: dict[str, Any],
    prefix: str,
    variant: str = "",
    sparse: bool = False,
) -> list[Field]:
    required = section.get("required", ())
    return [
        _field(prefix + name, node, name in required, definitions, variant, sparse)
        for name, node in section["properties"].items()
    ]


def _field(
    key: str,
    node: dict[str, Any],
    required: bool,
    definitions: dict[str, Any],
    variant: str = "",
    sparse: bool = False,
) -> Field:
    inner, optional = node, sparse
    if "anyOf" in node:
        kinds = [each for each in node["anyOf"] if each.get("type") != "null"]
        optional = optional or len(kinds) < len(node["anyOf"])
        inner = kinds[0] if len(kinds) == 1 else {}
    kind, choices = _kind(inner, optional)
    limits = ", ".join(f"{sign} {inner[name]}" for name, sign in LIMITS.items() if name in inner)
    item = _section(inner.get("items", {}), definitions) or {"properties": {}}
    return Field(
        key=key,
        variant=variant,
        kind=kind,
        meaning=node.get("description", ""),
        limits=limits,
        optional=optional,
        default=MISSING if required else node.get("default"),
        choices=choices,
        sparse=sparse,
        item_keys=tuple(item["properties"]),
        item_defaults={k: v["default"] for k, v in item["properties"].items() if "default" in v},
    )


def _kind(node: dict[str, Any], optional: bool) -> tuple[Kind, tuple[Any, ...]]:
    """What stands in a field of this schema, and its choices."""
    absent = (ABSENT,) if optional else ()
    if "enum" in node or "const" in node:
        return "choice", (*absent, *node.get("enum", [node.get("const")]))
    if node.get("type") == "boolean":
        return ("choice", (*absent, True, False)) if optional else ("switch", ())
    kinds: dict[Any, Kind] = {"integer": "integer", "number": "number", "string": "text"}
    return kinds.get(node.get("type"), "yaml"), ()


def _section(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a property refers to, be it optional; None for a plain value."""
    for each in (node, *node.get("anyOf", ())):
        if "$ref" in each:
            return definitions[_name(each["$ref"])]
    return None


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]
