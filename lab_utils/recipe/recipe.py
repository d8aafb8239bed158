"""The recipe: the only configuration of a run.

Typed, frozen, unknown keys refused with the nearest valid name. A recipe is the same object, with the same hash,
whether it came from a named function, a YAML file, the command line, a widget or a papermill parameter::

    recipe = Recipe.load("sft_tiny").with_changes({"schedule.steps": 50, "optim.lr": "1e-4"})
    recipe.hash          # 'b1946a'…: over everything that changes the result; name and tracking don't

Field descriptions are the documentation: forms, ``lab recipe show`` and error messages are made from them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from lab_utils.errors import LayoutError, RecipeError
from lab_utils.recipe.base import Section
from lab_utils.recipe.objectives import Objective, RolloutSection, SftObjective
from lab_utils.recipe.sections import (
    ClusterSection,
    DataSection,
    ModelSection,
    OptimSection,
    ParallelSection,
    ScheduleSection,
    TrackingSection,
)
from lab_utils.registry import load as load_member
from lab_utils.registry import members, nearest

# libyaml's is ten times as fast, which a table of many runs notices.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
OBJECTIVES = ("sft", "preference", "reward", "grpo", "distill")
UNHASHED = (
    "name",
    "tracking",
    "schedule.async_save",
    "cluster.launcher",
    "cluster.options",
    "cluster.profile",
)  # dotted keys of what changes no result


class Recipe(Section):
    """Everything that a run needs. See the module's head for use; ``Recipe.model_json_schema()`` for forms."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="First part of the run's name."
    )
    seed: int = Field(0, ge=0, description="Seed of initialisation, shuffling and every random number.")
    model: ModelSection = ModelSection()
    data: DataSection
    objective: Objective = SftObjective()
    rollout: RolloutSection | None = Field(
        None,
        description="How samples are taken; there for objectives that learn from samples, and only there.",
    )
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    schedule: ScheduleSection = ScheduleSection()
    cluster: ClusterSection = ClusterSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def _samples_have_a_section(cls, tree: Any) -> Any:
        """``rollout`` is there exactly where the objective learns from samples."""
        if not isinstance(tree, dict) or not isinstance(tree.get("objective", {}), dict):
            return tree
        objective = {"kind": "sft", **tree.get("objective", {})}
        tree = {**tree, "objective": objective}
        samples = takes_samples(objective)
        if samples and tree.get("rollout") is None:
            return {**tree, "rollout": {}}
        if not samples and tree.get("rollout") is not None:
            raise ValueError(
                f"rollout would change nothing under objective.kind={objective['kind']}, which takes no "
                "samples: leave the section out"
            )
        return tree

    @model_validator(mode="after")
    def _a_reward_model_predicts_no_token(self) -> Recipe:
        if self.objective.kind == "reward" and self.model.mtp_loss:
            raise ValueError(
                f"model.mtp_loss={self.model.mtp_loss} predicts tokens, and a reward model (objective.kind=reward) "
                "has no head for them: set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _a_cut_row_has_a_loss_a_token(self) -> Recipe:
        if self.parallel.cp > 1 and self.objective.kind != "sft":
            raise ValueError(
                f"parallel.cp={self.parallel.cp} cuts rows over ranks, and objective.kind={self.objective.kind} "
                "compares whole answers: set parallel.cp to 1 (it goes with objective.kind=sft)"
            )
        return self

    @model_validator(mode="after")
    def _what_is_chosen_is_not_given(self) -> Recipe:
        given = {
            "schedule.micro_rows": self.schedule.micro_rows,
            "model.checkpointing": None if self.model.checkpointing == "none" else self.model.checkpointing,
        }
        for key, value in given.items():
            if self.parallel.auto and value is not None:
                raise ValueError(
                    f"parallel.auto chooses {key} as well, and it is {value}: leave it out, or give a layout"
                )
        return self

    # -- construction -----------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, tree: dict[str, Any], where: str = "the recipe") -> Recipe:
        """A recipe from a nested dictionary.

        Raises:
            RecipeError: unknown key (with the nearest valid one), wrong type or value, named by its dotted path.
        """
        if not isinstance(tree, dict):
            raise RecipeError(f"{where}: expected a mapping of sections, found {type(tree).__name__}.")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_explain(cls, error)}") from None

    @classmethod
    def problems(cls, tree: dict[str, Any]) -> list[tuple[str, str]]:
        """What keeps a nested dictionary from being a recipe: the dotted key and a sentence of each; [] if nothing.

        The key is a section's, or empty, where fields don't go together: then the sentence names them.
        """
        try:
            cls.model_validate(tree)
        except ValidationError as error:
            # An unknown key explains a missing one better than the reverse.
            found = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
            return [_problem(cls, each) for each in found]
        return []

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """A named recipe of ``lab_utils/recipes``, or a YAML file."""
        path = Path(source)
        if path.suffix in (".yaml", ".yml"):
            try:
                tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
            except FileNotFoundError:
                raise RecipeError(f"{path}: there is no such recipe file; check the path.") from None
            except yaml.YAMLError as error:
                line = getattr(getattr(error, "problem_mark", None), "line", None)
                at = f" at line {line + 1}" if line is not None else ""
                raise RecipeError(f"{path}: not valid YAML{at}; correct the file.") from None
            return cls.parse(tree, str(path))
        known = members("lab_utils.recipes")
        if str(source) not in known:
            hint = nearest(str(source), known)
            raise RecipeError(
                f"There is no recipe '{source}': {hint} (lab recipe list), or give a .yaml file."
            )
        return load_member("lab_utils.recipes", str(source)).recipe()

    def with_changes(self, changes: dict[str, Any]) -> Recipe:
        """A copy with dotted keys replaced, checked like any recipe: ``{"optim.lr": 3e-4}``.

        Values given as text are read as YAML, so ``--set a.b=3e-4`` and ``{"a.b": 3e-4}`` mean the same.
        ``{"parallel": "auto"}`` takes back all of the layout that the recipe names.
        """
        tree = self.model_dump(mode="json")
        for key, value in changes.items():
            node, parts = tree, key.split(".")
            for part in parts[:-1]:
                if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                    node = node[int(part)]
                elif isinstance(node, dict) and isinstance(node.get(part), dict | list):
                    node = node[part]
                else:
                    raise RecipeError(f"'{key}' is no key of a recipe: {nearest(key, _keys(type(self)))}")
            value = yaml.safe_load(value) if isinstance(value, str) else value
            if key == "parallel" and value == "auto":  # what the planner chooses is no longer given
                value = {"auto": True}
                tree["schedule"]["micro_rows"], tree["model"]["checkpointing"] = None, "none"
            leaf: Any = parts[-1]
            if isinstance(node, list):
                if not (leaf.isdigit() and int(leaf) < len(node)):
                    raise RecipeError(f"'{key}': expected an index below {len(node)}.")
                leaf = int(leaf)
            node[leaf] = value
        return Recipe.parse(tree)

    # -- identity ---------------------------------------------------------------------------------------------------

    @property
    def hash(self) -> str:
        """64 hex digits over everything that changes the result."""
        tree = self.model_dump(mode="json")
        for key in UNHASHED:
            *sections, leaf = key.split(".")
            node = tree
            for section in sections:
                node = node[section]
            del node[leaf]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    # -- layout -----------------------------------------------------------------------------------------------------

    @property
    def rows_per_step(self) -> int:
        return self.schedule.batch_tokens // self.data.row_tokens

    def layout(self, world_size: int | None = None) -> tuple[int, int, int]:
        """``(dp, micro_rows, accumulation)`` for a number of ranks; dp counts those with rows of their own.

        Raises:
            LayoutError: ranks, batch and rows do not divide; the message names the knob.
        """
        if self.parallel.auto:
            raise LayoutError(
                "parallel is auto, and nothing has chosen a layout yet: launch the run, or write one with "
                "lab plan RECIPE --write FILE."
            )
        world = self.cluster.world_size if world_size is None else world_size
        parallel, rows, T = self.parallel, self.rows_per_step, self.data.row_tokens
        if world % parallel.pp:
            raise LayoutError(
                f"parallel.pp={parallel.pp} does not divide {world} ranks: set it to a divisor of {world}, or change "
                f"cluster.nproc."
            )
        if parallel.virtual_stages > 1 and parallel.pp == 1:
            raise LayoutError(
                f"parallel.virtual_stages={parallel.virtual_stages} needs a pipeline: set parallel.pp to 2 or more, or "
                f"virtual_stages to 1."
            )
        stages = parallel.pp * parallel.cp
        if world % stages:
            raise LayoutError(
                f"parallel.cp={parallel.cp} does not divide the {world // parallel.pp} ranks of a stage: set it to a "
                f"divisor, or change cluster.nproc."
            )
        if T % parallel.cp:
            raise LayoutError(
                f"parallel.cp={parallel.cp} does not divide data.row_tokens={T}: its ranks have runs of equal length."
            )
        dp = parallel.dp or world // stages
        if self.schedule.batch_tokens % T or rows == 0:
            raise LayoutError(
                f"schedule.batch_tokens={self.schedule.batch_tokens} is not a multiple of data.row_tokens={T}: "
                f"use {max(1, round(self.schedule.batch_tokens / T)) * T}."
            )
        if dp * stages != world:
            each = f" of {parallel.pp} stages" if parallel.pp > 1 else ""
            each += f" with rows cut by {parallel.cp}" if parallel.cp > 1 else ""
            raise LayoutError(
                f"parallel.dp={dp}{each} does not match {world} ranks: set parallel.dp={world // stages} or "
                f"cluster.nproc={dp * stages}."
            )
        if dp * parallel.cp % parallel.ep:
            raise LayoutError(
                f"parallel.ep={parallel.ep} does not divide the {dp * parallel.cp} data-parallel ranks: "
                f"set it to a divisor of {dp * parallel.cp}, or change cluster.nproc."
            )
        if rows % dp:
            sharers = f"{dp} ranks" if parallel.cp == 1 else f"{dp} groups of {parallel.cp} ranks"
            raise LayoutError(
                f"A batch of {rows} rows ({self.schedule.batch_tokens} tokens) cannot be shared evenly by {sharers}: "
                f"set schedule.batch_tokens to a multiple of {dp * T}, or change cluster.nproc."
            )
        # A pipeline wants many micro-batches, one row each where nothing is said; else one pass is the fastest.
        micro = self.schedule.micro_rows or (1 if parallel.pp > 1 else rows // dp)
        if (rows // dp) % micro:
            raise LayoutError(
                f"schedule.micro_rows={micro} does not divide the {rows // dp} rows of a rank: "
                f"use a divisor of {rows // dp}."
            )
        passes, stages = rows // dp // micro, parallel.pp
        if passes < stages or (parallel.virtual_stages > 1 and passes % stages):
            needed = "a multiple of" if parallel.virtual_stages > 1 else "at least"
            raise LayoutError(
                f"A pipeline of {stages} stages needs {needed} {stages} micro-batches a rank, but {rows // dp} rows in "
                f"micro-batches of {micro} are {passes}: lower schedule.micro_rows, or raise schedule.batch_tokens to "
                f"{stages * micro * dp * T}."
            )
        return dp, micro, passes


def parse_changes(pairs: list[str]) -> dict[str, str]:
    """``["optim.lr=3e-4"]`` as a dictionary for ``Recipe.with_changes``."""
    for pair in pairs:
        if "=" not in pair:
            raise RecipeError(f"--set {pair}: expected KEY=VALUE, as in --set optim.lr=3e-4.")
    return dict(pair.split("=", 1) for pair in pairs)


def takes_samples(objective: dict[str, Any]) -> bool:
    """Whether a run of this ``objective`` section learns from samples of the model's own, and so has ``rollout``."""
    kind = objective.get("kind", "sft")
    return kind == "grpo" or (kind == "distill" and bool(objective.get("on_policy", True)))


def _keys(section: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of a recipe, for hints; of a union those of every member."""
    keys = []
    for name, field in section.model_fields.items():
        inner = [field.annotation, *get_args(field.annotation)]
        sections = [each for each in inner if isinstance(each, type) and issubclass(each, Section)]
        for each in sections:
            keys += _keys(each, f"{prefix}{name}.")
        if not sections:
            keys.append(prefix + name)
    return list(dict.fromkeys(keys))


def _explain(root: type[Section], error: ValidationError) -> str:
    """The first problem of a pydantic error as one sentence, and how many more there are."""
    problems = error.errors()
    # An unknown key explains a missing one better than the reverse.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    _, text = _problem(root, first)
    more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
    return text.rstrip(".") + more + ("" if text.endswith("?") and not more else ".")


def _problem(root: type[Section], first: Any) -> tuple[str, str]:
    """The dotted key of one of pydantic's errors, and a sentence."""
    place = [str(part) for part in first["loc"]]
    if place[:1] == ["objective"] and len(place) > 1 and place[1] in OBJECTIVES:
        del place[1]  # which member of the union it is
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        above = ".".join(part for part in place[:-1] if not part.isdigit())
        siblings = [k.rpartition(".")[2] for k in _keys(root) if above and k.rpartition(".")[0] == above]
        siblings = siblings or sorted({k.split(".")[0] for k in _keys(root)})
        text = f"'{key}' is no key of a recipe, {nearest(str(first['loc'][-1]), siblings)}"
    elif first["type"] == "missing":
        text = f"'{key}' is missing; give it a value"
    elif first["type"] == "union_tag_invalid":
        text = f"{key}.kind: {nearest(str(first['ctx']['tag']), list(OBJECTIVES))}"
    else:
        found = f" (found {first['input']!r})" if key and not isinstance(first["input"], dict) else ""
        said = first["msg"].removeprefix("Value error, ")
        text = f"{key + ': ' if key and not said.startswith(key) else ''}{said}{found}"
    return key, text if text.endswith("?") else text.rstrip(".") + "."
