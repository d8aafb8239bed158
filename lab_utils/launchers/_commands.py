"""``lab render``: what a launch would submit, and the settings that a launcher takes."""

from __future__ import annotations

import typer

from lab_utils.console import emit, table
from lab_utils.errors import RecipeError


def render(
    recipe: str = typer.Argument(None, help="A named recipe (lab recipe list) or a YAML file."),
    launcher: str = typer.Option(None, "--launcher", help="The same as --set cluster.launcher=NAME."),
    changes: list[str] = typer.Option(
        [], "--set", help="A change, as in --set cluster.options.partition=a3."
    ),
    nodes: int = typer.Option(None, "--nodes", min=1, help="Machines; the same as --set cluster.nodes=N."),
    nproc: int = typer.Option(
        None, "--nproc", min=1, help="Ranks a node; the same as --set cluster.nproc=N."
    ),
    options: str = typer.Option(None, "--options", help="List the settings of a launcher instead."),
    root: str = typer.Option(None, "--runs", help="Folder of runs; default ASCENT_RUNS or ./runs."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Print the exact script or manifest that a launch would submit; nothing is made or started."""
    from lab_utils.launchers._base import preview

    if options is not None:
        return _list_options(options, as_json)
    if recipe is None:
        raise RecipeError("lab render needs a recipe (lab recipe list), or --options LAUNCHER.")
    resolved = changed(recipe, changes, launcher, nodes, nproc)
    text = preview(resolved, root)
    row = {
        "recipe": resolved.name,
        "hash": resolved.hash,
        "launcher": resolved.cluster.launcher,
        "script": text,
    }
    emit(row, as_json, lambda: print(text, end=""))


def changed(
    recipe: str, changes: list[str], launcher: str | None, nodes: int | None, nproc: int | None
):  # a Recipe, imported late
    """A recipe with changes and the shorthands for where it runs, and with a layout where it leaves that open."""
    from lab_utils.planner.auto import chosen
    from lab_utils.recipe import Recipe, parse_changes

    given = {**parse_changes(changes), **places(launcher, nodes, nproc)}
    return chosen(Recipe.load(recipe).with_changes(given))


def places(launcher: str | None, nodes: int | None, nproc: int | None) -> dict[str, str | int]:
    """The shorthands ``--launcher``, ``--nodes`` and ``--nproc`` as keys of a recipe."""
    given = {"cluster.launcher": launcher, "cluster.nodes": nodes, "cluster.nproc": nproc}
    return {key: value for key, value in given.items() if value is not None}


def _list_options(launcher: str, as_json: bool) -> None:
    from lab_utils.launchers._base import options_class

    kind = options_class(launcher)
    properties = kind.model_json_schema()["properties"] if kind else {}
    rows = [
        {
            "key": f"cluster.options.{name}",
            "kind": _kind(properties[name]),
            "default": None if field.is_required() else field.get_default(),
            "needed": field.is_required(),
            "meaning": field.description,
        }
        for name, field in (kind.model_fields if kind else {}).items()
    ]

    def show() -> None:
        if not rows:
            print(f"The launcher '{launcher}' has no settings.")
            return
        lines = [
            (row["key"], row["kind"], "needed" if row["needed"] else _shown(row["default"]), row["meaning"])
            for row in rows
        ]
        table(f"Settings of the launcher {launcher}", ["key", "kind", "default", "meaning"], lines)

    emit(rows, as_json, show)


def _kind(schema: dict) -> str:
    """A JSON schema's type as a word for a person."""
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    words = {"array": "list", "object": "mapping", "string": "text", "boolean": "true or false"}
    return words.get(schema.get("type", ""), schema.get("type", "value"))


def _shown(default: object) -> str:
    return (
        ""
        if default in (None, (), {})
        else str(default).lower()
        if isinstance(default, bool)
        else str(default)
    )
