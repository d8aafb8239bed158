"""``lab card RUN``."""

from __future__ import annotations

import typer

from lab_utils.console import emit


def card(
    run: str = typer.Argument("last", help="A run's name, unique prefix, path, or last."),
    root: str = typer.Option(None, "--runs", help="Folder of runs; default ASCENT_RUNS or ./runs."),
    diff: bool = typer.Option(
        False, "--diff", help="Print the uncommitted changes that the run was made with."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the card as JSON."),
) -> None:
    """Make the card of a run: data, settings, machines, speed, energy, results, and how to repeat it."""
    from lab_utils.errors import RunError
    from lab_utils.runs.card import NAMES, write
    from lab_utils.runs.directory import find, read_json

    directory = find(run, root)
    if diff:
        code = directory.provenance.get("git") or {}
        if not code.get("diff") or code.get("diff_cut"):
            what = (
                "was longer than is kept"
                if code.get("diff_cut")
                else "is not there: the tree was clean, or no clone"
            )
            raise RunError(f"{directory.name}: the diff {what}; see git in {directory.path}/provenance.json.")
        print(code["diff"], end="")
        return
    paths = write(directory)

    def render() -> None:
        print((directory.path / NAMES["md"]).read_text(encoding="utf-8"))
        for path in paths.values():
            print(path)

    emit(read_json(paths["json"]), as_json, render)
