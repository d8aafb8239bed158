"""What a launcher is: a module of this folder with these functions. One file beside the others is enough.

A launcher with settings of its own has a class ``Options`` (``LauncherOptions`` with described fields), which checks
``cluster.options`` and from which forms and ``lab render --options NAME`` are made. ``queue(recipe) -> str`` may say
what a job would meet.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError

from lab_utils.errors import RecipeError
from lab_utils.recipe import Recipe
from lab_utils.recipe.base import Section
from lab_utils.registry import load, members, nearest
from lab_utils.runs.directory import RunDirectory, default_root
from lab_utils.runs.states import JobState


@dataclass(frozen=True)
class JobInfo:
    """What a launcher knows of a job beside its state; what it doesn't know is absent."""

    state: JobState
    detail: str = ""  # why it waits, or how it ended: a phrase for a person
    position: int | None = None  # in the queue; 1 is next
    seconds_left: float | None = None  # until its time limit
    restarts: int = 0
    nodes: tuple[str, ...] = ()

    def words(self) -> dict[str, str]:
        """What there is to say to a person, as short lines by name."""
        place = f"place {self.position} in the queue" if self.position else ""
        left = "" if self.seconds_left is None else f"{self.seconds_left / 3600:.1f} h"
        nodes = ", ".join(self.nodes[:4]) + (
            f" and {len(self.nodes) - 4} more" if len(self.nodes) > 4 else ""
        )
        said = {
            "waits" if self.state == JobState.PENDING else "job says": "; ".join(
                filter(None, (place, self.detail))
            ),
            "time left": left,
            "restarts": str(self.restarts or ""),
            "nodes": nodes,
        }
        return {key: text for key, text in said.items() if text}


class LauncherOptions(Section):
    """What a launcher's ``Options`` is made from; YAML's numbers are words where words are asked for."""

    model_config = ConfigDict(coerce_numbers_to_str=True)


def _words(given: Any) -> Any:
    """YAML's numbers and truth values, as a shell or a label has them."""
    if not isinstance(given, dict):
        return given
    return {key: str(value).lower() if isinstance(value, bool) else value for key, value in given.items()}


def _names(given: dict[str, str]) -> dict[str, str]:
    for key in given:
        if not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise ValueError(f"'{key}' is no name of a variable: use letters, digits and _")
    return given


Words = Annotated[dict[str, str], BeforeValidator(_words)]
Variables = Annotated[Words, AfterValidator(_names)]


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

    def describe(self, run_dir: RunDirectory) -> JobInfo:
        """The same with place in the queue, reason, time left, restarts and nodes. Never raises either."""
        ...

    def stop(self, run_dir: RunDirectory, checkpoint: bool = True) -> None:
        """Ask the job to end at its next step, after a checkpoint or without. Returns at once."""
        ...

    def logs(self, run_dir: RunDirectory, lines: int = 50, rank: int | None = None) -> str:
        """The end of the logs: of one rank, or of all and the launcher."""
        ...

    def check(self, recipe: Recipe, root: Path) -> str:
        """What can be told before a start; says what was found and what is taken for granted.

        Raises:
            LabError: what keeps the job from being started from this machine.
        """
        ...


MEMBERS = "lab_utils.launchers"
SCRIPT = "launch.sh"
_RANK_LOG = re.compile(r"(node|rank)-(\d+)\.log$")


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


def options_class(name: str) -> type[Section] | None:
    """The class of a launcher's settings; None where it has none.

    Raises:
        RecipeError: there is no such launcher.
    """
    return getattr(get_launcher(name), "Options", None)


def options_of(recipe: Recipe, launcher: str | None = None) -> Any:
    """``cluster.options`` as the ``Options`` of a launcher (the recipe's); None where it has none and none are given.

    Raises:
        RecipeError: an unknown setting (with the nearest), or one of a wrong kind.
    """
    name, given = launcher or recipe.cluster.launcher, recipe.cluster.options
    kind = options_class(name)
    if kind is None:
        if given:
            raise RecipeError(
                f"cluster.options: the launcher '{name}' has no settings, found {', '.join(sorted(given))}: leave "
                "them out, or set cluster.launcher."
            )
        return None
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problems = error.errors()
        first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
        path = [str(part) for part in first["loc"]]
        key = ".".join(["cluster.options", *path])
        if first["type"] == "extra_forbidden":
            known = list(kind.model_fields) if len(path) == 1 else []
            hint = nearest(path[-1], known) if known else "leave it out"
            text = f"'{key}' is no setting of the launcher '{name}', {hint} (lab render --options {name})"
        elif first["type"] == "missing":
            text = f"'{key}' is missing, and the launcher '{name}' needs it: lab render --options {name}"
        elif first["type"] == "string_pattern_mismatch" and len(path) == 1:
            meaning = str(kind.model_fields[path[0]].description).rstrip(".")
            text = f"{key}: '{first['input']}' is not of its form ({meaning})"
        else:
            found = "" if isinstance(first["input"], dict) else f" (found {first['input']!r})"
            text = f"{key}: {first['msg'].removeprefix('Value error, ')}{found}"
        raise RecipeError(f"{text.rstrip('.')}.") from None


def preview(recipe: Recipe, root: str | Path | None = None) -> str:
    """What a launch now would submit: the exact script or manifest, for a run directory that isn't made.

    Raises:
        RecipeError: no such launcher, or settings that it doesn't take.
    """
    folder = Path(root) if root is not None else default_root()
    name = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{recipe.hash[:6]}"
    return get_launcher(recipe.cluster.launcher).render(RunDirectory(folder / name), recipe)


# -- logs ----------------------------------------------------------------------------------------------


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


def log_files(folder: Path) -> list[Path]:
    """``launcher.log``, then every ``node-*.log`` and ``rank-*.log`` by number."""
    numbered = [(match[1], int(match[2]), path) for path, match in _matches(folder)]
    return [folder / "launcher.log", *(path for _, _, path in sorted(numbered))]


def _matches(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in folder.glob("*.log"):
        if match := _RANK_LOG.match(path.name):
            yield path, match


def read_logs(folder: Path, lines: int, rank: int | None) -> str:
    """The end of every log of a run, each under its name; or of one rank alone."""
    if rank is not None:
        return tail(folder / f"rank-{rank}.log", lines)
    parts = []
    for path in log_files(folder):
        if text := tail(path, lines):
            parts.append(f"==> {path.name} <==\n{text}")
    return "\n".join(parts)


# -- scripts -------------------------------------------------------------------------------------------


def exports(variables: Mapping[str, str], soft: Mapping[str, str]) -> str:
    """``export`` lines of a script; ``soft`` values stand back where the environment has the variable."""
    from shlex import quote

    firm = [f"export {key}={quote(value)}" for key, value in variables.items()]
    yielding = [f"export {key}=${{{key}:-{value}}}" for key, value in soft.items()]
    return "\n".join(firm + yielding)
