"""The card of a run: what another lab needs to judge it and to repeat it. card.md, card.html, card.json.

    card(run)["tokens_per_s"]
    write(run)             # {"md": …/card.md, "html": …, "json": …}: made as a run ends, and again by eval and audit

Everything comes from the files of the run directory; the same files give the same card. What they don't say is null in
the JSON and "not recorded" for a reader, with the reason under ``not_recorded``: nothing is guessed. A run that failed,
that is still going, or whose files are damaged has a card too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.runs.card import _data as data
from lab_utils.runs.card import _history as history
from lab_utils.runs.card import _machines as machines
from lab_utils.runs.card import _model as models
from lab_utils.runs.card import _results as results
from lab_utils.runs.directory import RunDirectory, find, read_json, write_atomic

if TYPE_CHECKING:
    from lab_utils.runs.api import Run

VERSION = 1  # of the JSON's structure
NAMES = {"md": "card.md", "html": "card.html", "json": "card.json"}
FACTS = "facts.json"


def card(run: Run | RunDirectory | str | Path, *, brief: bool = False) -> dict[str, Any]:
    """The card as JSON values.

    Args:
        run: a run, its directory, name, unique prefix or path, or ``last``.
        brief: don't read gigabytes of chip samples again for the energy: the nodes' own sums, without their coverage.

    Returns:
        ``run``, ``state``, ``data``, ``model``, ``objective``, ``optimizer``, ``layout``, ``hardware``, ``attempts``,
        ``wall_clock_s``, ``steps``, ``tokens``, ``tokens_per_s`` (tokens over the time in steps), ``mfu`` (mean over
        the same), ``throughput``, ``chips``, ``energy_kwh``, ``energy``, ``curves``, ``loss``, ``evaluation``,
        ``audit``, ``stability``, ``software``, ``reproduce``, ``not_recorded``. docs/card.md lists all of it.

    Raises:
        RunError: there is no such run.
    """
    return _Card(directory_of(run), brief).build()


def directory_of(run: Run | RunDirectory | str | Path) -> RunDirectory:
    if isinstance(run, RunDirectory):
        return run
    return getattr(run, "directory", None) or find(str(run))


def write(run: Run | RunDirectory | str | Path, *, brief: bool = False) -> dict[str, Path]:
    """Make the card and store it in the run directory, each file whole or not at all; returns their paths.

    Raises:
        RunError: there is no such run.
    """
    from lab_utils.runs.card._markdown import markdown
    from lab_utils.runs.card._page import page
    from lab_utils.runs.card._sheet import sheet

    directory = directory_of(run)
    found = card(directory, brief=brief)
    drawn = sheet(found)
    texts = {
        "md": markdown(drawn),
        "html": page(drawn, found),
        "json": json.dumps(found, indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n",
    }
    paths = {kind: directory.path / name for kind, name in NAMES.items()}
    for kind, path in paths.items():
        write_atomic(path, texts[kind], durable=False)
    return paths


def refresh(run: Run | RunDirectory | str | Path, *, brief: bool = True) -> None:
    """``write`` for those whose own work must not fail for a card: whatever goes wrong is a warning."""
    try:
        write(run, brief=brief)
    except Exception as error:  # a full disk, a file that somebody has edited
        print(
            f"warning: the run card could not be made ({type(error).__name__}: {error}); the run is not affected, and "
            "lab card makes it again.",
            file=sys.stderr,
            flush=True,
        )


class _Card:
    """The parts of one card; a part whose file is damaged becomes None and leaves its reason."""

    def __init__(self, run: RunDirectory, brief: bool):
        self.run, self.brief = run, brief
        self.problems: dict[str, str] = {}

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:  # files may be anything: a card says so and goes on
            text = " ".join(str(error).split())[:200]
            self.problems[name] = f"{type(error).__name__}: {text}"
            return None

    def build(self) -> dict[str, Any]:
        run, part = self.run, self.part
        # Imported here: the launchers, which the state may be asked of, are no part of reading files.
        from lab_utils.panels.layout import PANELS
        from lab_utils.runs.api import Run
        from lab_utils.runs.steps import merge_steps

        recipe = part("recipe", lambda: run.recipe)
        status = part("status", lambda: Run(run).status) or run.status
        provenance, facts = run.provenance, read_json(run.path / FACTS)
        tried = facts.get("attempts") if isinstance(facts.get("attempts"), list) else []
        rows, events = run.rows("metrics.jsonl"), run.rows("events.jsonl")
        steps = merge_steps(rows)

        attempts = part("attempts", lambda: history.attempts(run, rows, events, facts)) or []
        seconds = history.wall_clock(attempts)
        tokens = history.last(steps, "train/num_tokens")
        speed = part("throughput", lambda: history.throughput(steps, seconds)) or {}
        energy = part("energy", lambda: history.energy(run, tokens, self.brief))
        done = max(steps, default=0)
        loss = tuple(key for key in ("train/loss", "eval/loss") if history.last(steps, key) is not None)
        if recipe is None:
            # Nothing below can be told without a recipe; its own problem says why.
            made = dict.fromkeys(
                ("data", "model", "objective", "rollout", "optimizer", "layout", "hardware", "reproduce")
            )
        else:
            epochs = history.last(steps, "train/epoch")
            made = {
                "data": part("data", lambda: data.data(recipe, provenance, facts, epochs)),
                "model": part("model", lambda: models.model(run, recipe)),
                "objective": recipe.objective.model_dump(mode="json"),
                "rollout": recipe.rollout.model_dump(mode="json") if recipe.rollout else None,
                "optimizer": part("optimizer", lambda: models.optimizer(run, recipe)),
                "layout": part("layout", lambda: machines.layout(recipe, provenance, tried)),
                "hardware": part("hardware", lambda: machines.hardware(recipe, provenance, tried, status)),
                "reproduce": part("reproduce", lambda: machines.reproduce(run, recipe, provenance)),
            }
        found = {
            "version": VERSION,
            "run": run.name,
            "path": str(run.path),
            "state": status.get("state"),
            "error": status.get("error"),
            "recipe": recipe.name if recipe else None,
            "created": status.get("created"),
            "started": attempts[0]["started"] if attempts else None,
            "ended": attempts[-1]["ended"] if attempts else None,
            "queued_s": _between(status.get("created"), attempts),
            "attempts": attempts,
            "wall_clock_s": seconds,
            "steps": done or None,
            "planned_steps": recipe.schedule.steps if recipe else status.get("total_steps"),
            "tokens": int(tokens) if tokens is not None else None,
            "tokens_per_s": (speed.get("mean") or {}).get("tokens_per_s"),
            "mfu": (speed.get("mean") or {}).get("mfu"),
            "throughput": speed or None,
            "chips": part("chips", lambda: history.utilisation(steps)),
            "energy_kwh": energy["kwh"] if energy else None,
            "energy": energy,
            **made,
            "loss": part("loss", lambda: history.tenths(steps, loss, done)) if loss else None,
            "curves": part("curves", lambda: history.curves(steps, {k for p in PANELS for k in p.keys})),
            "evaluation": part("evaluation", lambda: results.evaluation(run, steps)),
            "audit": part("audit", lambda: results.audit(run)),
            "stability": part("stability", lambda: history.stability(steps, rows, events)),
            "software": part("software", lambda: machines.software(provenance, tried)),
        }
        found["not_recorded"] = {**self._absent(found), **self.problems}
        return found

    def _absent(self, found: dict[str, Any]) -> dict[str, str]:
        """Why a figure that people ask for is missing, and what would supply it."""
        name, kind = self.run.name, (found["hardware"] or {}).get("kind")
        power = "no chip of this machine reports its power" if kind == "cpu" else "no power was sampled"
        reasons = {
            "mfu": "the peak rate of this device is not known"
            if found["tokens_per_s"]
            else "no step was logged",
            "tokens_per_s": "no step was logged",
            "tokens": "no step was logged",
            "wall_clock_s": "the run has not started",
            "energy_kwh": power,
            "evaluation": f"not evaluated: lab eval {name}",
            "audit": f"not measured: lab audit {name}",
        }
        return {key: reason for key, reason in reasons.items() if found[key] is None}


def _between(created: Any, attempts: list[dict[str, Any]]) -> float | None:
    if not attempts or history.number(created) is None:
        return None
    return round(max(attempts[0]["started"] - float(created), 0.0), 3)
