"""``lab recipe list | show``."""

from __future__ import annotations

import typer

from lab_utils.console import emit, table

app = typer.Typer(help="Named recipes and what is in them.", no_args_is_help=True)


@app.command("list")
def list_recipes(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """The recipes that ship, each with its first line of description."""
    from lab_utils.registry import load, members

    rows = [
        {"recipe": name, "about": (load("lab_utils.recipes", name).__doc__ or "").strip().splitlines()[0]}
        for name in members("lab_utils.recipes")
    ]
    emit(rows, as_json, lambda: table("Recipes", ["recipe", "about"], [r.values() for r in rows]))


@app.command("show")
def show(
    recipe: str = typer.Argument(help="A named recipe or a YAML file."),
    changes: list[str] = typer.Option([], "--set", help="A change, as in --set optim.lr=3e-4."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """The whole recipe, defaults included, as YAML that can be edited and given back to lab run."""
    from lab_utils.recipe import Recipe, parse_changes

    resolved = Recipe.load(recipe).with_changes(parse_changes(changes))
    emit(
        {**resolved.model_dump(mode="json"), "hash": resolved.hash},
        as_json,
        lambda: print(f"# hash {resolved.hash[:12]}\n{resolved.to_yaml()}", end=""),
    )
