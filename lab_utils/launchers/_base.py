"""What a launcher is: a module of this folder with five functions. One file beside the others is enough."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from lab_utils.errors import RecipeError
from lab_utils.recipe import Recipe
from lab_utils.registry import load, members
from lab_utils.runs.directory import RunDirectory
from lab_utils.runs.states import JobState


class Launcher(Protocol):
    """How a job is started, asked after and ended. A run never depends on the process that called these."""

    def render(self, run_dir: RunDirectory, recipe: Recipe) -> str:
        """The exact script, the same for the same arguments; nothing is started or written."""
        ...

    def submit(self, run_dir: RunDirectory, recipe: Recipe) -> str:
        """Store the script in the run directory and start it; returns the job's id. State becomes ``queued``.

        Raises:
            RunError: the job could not be started.
        """
        ...

    def status(self, run_dir: RunDirectory) -> JobState:
        """What the launcher knows of the run's job. Never raises for a job that is gone."""
        ...

    def stop(self, run_dir: RunDirectory, checkpoint: bool = True) -> None:
        """Ask the job to end at its next step, after a checkpoint or without. Returns at once."""
        ...

    def logs(self, run_dir: RunDirectory, lines: int = 50, rank: int | None = None) -> str:
        """The end of the logs: of one rank, or of all and the launcher."""
        ...


MEMBERS = "lab_utils.launchers"
SCRIPT = "launch.sh"


def get_launcher(name: str) -> Launcher:
    """The launcher of a name.

    Raises:
        RecipeError: there is none.
    """
    try:
        return load(MEMBERS, name)  # type: ignore[return-value]  # a module has the protocol's functions
    except KeyError:
        raise RecipeError(
            f"cluster.launcher: there is no launcher '{name}'; known: {', '.join(members(MEMBERS))}."
        ) from None


def tail(path: Path, lines: int) -> str:
    """The last lines of a file, read from its end; empty where it is missing."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - max(lines, 1) * 400))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def read_logs(folder: Path, lines: int, rank: int | None) -> str:
    """The end of ``logs/launcher.log`` and ``logs/rank-*.log``, each under its name; or of one rank alone."""
    if rank is not None:
        return tail(folder / f"rank-{rank}.log", lines)
    ranks = sorted(folder.glob("rank-*.log"), key=lambda p: int("0" + "".join(filter(str.isdigit, p.stem))))
    parts = []
    for path in [folder / "launcher.log", *ranks]:
        if text := tail(path, lines):
            parts.append(f"==> {path.name} <==\n{text}")
    return "\n".join(parts)


def exports(variables: Mapping[str, str], soft: Mapping[str, str]) -> str:
    """``export`` lines of a script; ``soft`` values stand back where the environment has the variable."""
    from shlex import quote

    firm = [f"export {key}={quote(value)}" for key, value in variables.items()]
    yielding = [f"export {key}=${{{key}:-{value}}}" for key, value in soft.items()]
    return "\n".join(firm + yielding)
