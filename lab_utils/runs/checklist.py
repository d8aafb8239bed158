"""The checks before a start, in order: ``checks.preflight`` ends at the first that fails, ``checklist`` makes them all.

A launcher may have a word: ``queue(recipe) -> str`` in its module says what the job will meet (nodes that are
idle, jobs that wait), or raises what keeps it from starting.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab_utils.errors import LabError, RunError
from lab_utils.launchers._base import get_launcher
from lab_utils.recipe import Recipe
from lab_utils.runs import checks
from lab_utils.runs.checks import existing
from lab_utils.runs.directory import all_runs
from lab_utils.runs.states import ACTIVE, STALE_SECONDS

# The newest runs that are asked whether they are active; older ones have ended.
LOOKED_AT = 200


@dataclass(frozen=True)
class Check:
    """One line of a checklist: what was looked at, whether it lets the run start, and a sentence."""

    name: str
    ok: bool
    text: str


def checks_of(recipe: Recipe, root: Path) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Every check by name, the cheapest first. It raises what keeps the run from starting, or says what it found."""
    cluster, parallel, source = recipe.cluster, recipe.parallel, recipe.model.source

    def layout() -> str:
        dp, micro, passes = recipe.layout()
        stages = f" × {counted(parallel.pp, 'stage')}" if parallel.pp > 1 else ""
        runs = f" × {parallel.cp} that share rows" if parallel.cp > 1 else ""
        ranks = f"{counted(cluster.world_size, 'rank')} = {dp} data-parallel{runs}{stages}"
        return f"{ranks}; a step is {passes} × {counted(micro, 'row')} on each."

    def devices() -> str:
        checks.check_accelerator(recipe)
        return f"{counted(cluster.nproc, 'rank')} on {checks.device_kind(recipe)}."

    def weights() -> str:
        checks.check_sources(recipe)
        return f"{source} is {'left to the machine that runs' if source.startswith('hf:') else 'there'}."

    yield "layout", layout
    yield "launcher", lambda: get_launcher(cluster.launcher).check(recipe, root)
    # The devices are the local launcher's business; a cluster has its own.
    if cluster.launcher == "local":
        yield "devices", devices
    if recipe.rollout is not None:
        yield "rollouts", lambda: checks.check_rollouts(recipe) or "Prompts, rewards and layout go together."
    yield "weights", weights
    if parallel.cp * parallel.ep * parallel.pp * parallel.virtual_stages > 1:
        yield "cut", lambda: checks.check_model(recipe) or "Layers and experts can be cut as the degrees ask."
    yield "disk", lambda: checks.check_disk(recipe, root)
    yield "output", lambda: check_output(recipe, root)
    yield "queue", lambda: check_queue(recipe, root)
    yield "data", lambda: checks.check_data(recipe)


def checklist(recipe: Recipe, root: Path) -> list[Check]:
    """The same checks to the last one, each with what it found; a reason that several meet stands once."""
    found: list[Check] = []
    for name, check in checks_of(recipe, root):
        try:
            found.append(Check(name, True, check() or ""))
        except LabError as error:
            if str(error) not in (other.text for other in found):
                found.append(Check(name, False, str(error)))
    return found


def check_output(recipe: Recipe, root: Path) -> str:
    """The folder of runs can be written and is no run itself; says which runs of the same recipe it holds.

    Raises:
        RunError: it can't, or it is one.
    """
    place = existing(root)
    if (place / "recipe.yaml").exists():
        raise RunError(f"{root} lies inside a run ({place}): choose another folder of runs by ASCENT_RUNS.")
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"{root} cannot be written: choose another folder of runs by ASCENT_RUNS.")
    same = sorted(path.name for path in root.glob(f"*-{recipe.hash[:6]}") if path.is_dir())
    if not same:
        return f"A new folder in {root}; no run of this recipe is there."
    return f"A new folder in {root}; {counted(len(same), 'run')} of this recipe there, the newest {same[-1]}."


def check_queue(recipe: Recipe, root: Path) -> str:
    """What the job will meet where it starts: the launcher's own word, or on this machine its other active runs.

    Raises:
        LabError: the launcher knows that the job can't start.
    """
    launcher = get_launcher(recipe.cluster.launcher)
    if ask := getattr(launcher, "queue", None):
        return ask(recipe)
    here, now = socket.gethostname(), time.time()
    stored = [(run.name, run.status) for run in all_runs(root)[-LOOKED_AT:]]
    active = [
        name
        for name, status in stored
        if status.get("state") in ACTIVE
        and status.get("host") == here
        and now - (status.get("heartbeat") or 0) < STALE_SECONDS
    ]
    if not active:
        return "No other run is active on this machine."
    return (
        f"{counted(len(active), 'other run')} active on this machine, the newest {active[-1]}: they share it."
    )


def counted(number: int, of: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {of}" + ("" if number == 1 else "s")
