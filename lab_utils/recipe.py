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
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lab_utils.errors import LayoutError, RecipeError
from lab_utils.registry import load as load_member
from lab_utils.registry import members, nearest

UNHASHED = ("name", "tracking", "schedule.async_save")  # dotted keys of what changes no result


class Section(BaseModel):
    """One part of a recipe: frozen, typed, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelSection(Section):
    source: str = Field(
        "base:tiny",
        description="Where weights come from: base:NAME (shipped), preset:NAME (random), hf:ORG/NAME, or a path.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Working precision; bfloat16 keeps fp32 master weights in the optimizer."
    )
    checkpointing: Literal["none", "mhc", "attention", "full"] = Field(
        "none",
        description="Activations made again in the backward pass to save memory: the hyper-connections' streams (mhc), "
        "attention, or whole layers (full).",
    )
    indexer_loss: float = Field(
        0.01, ge=0, description="Weight of the KL loss that trains the lightning indexer (V4 only)."
    )
    indexer_phase: Literal["sparse", "warmup"] = Field(
        "sparse",
        description="warmup: dense attention, and nothing but the indexer learns, before it may select (V4 only).",
    )
    mtp_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of multi-token prediction (V4 only; V4 used 0.3, then 0.1); 0 leaves its block out of the "
        "model and of what is saved.",
    )
    balance_loss: float = Field(
        0.0, ge=0, description="Weight of the experts' sequence-wise balance loss (V4 only; V4 used 1e-4)."
    )
    balance_rate: float = Field(
        0.0,
        ge=0,
        description="Step of the routers' balance bias (V4 only; 0.001 in pre-training); 0 keeps a trained model's.",
    )
    tokenizer: str | None = Field(
        None,
        description="Folder or tokenizer.json; absent: the one beside the weights, else the shipped one.",
    )
    encoding: str | None = Field(
        None,
        description="A checkpoint's encoding/ folder with the official fixed texts; absent: the shipped wording.",
    )

    @model_validator(mode="after")
    def _warmup_trains_the_indexer(self) -> ModelSection:
        if self.indexer_phase == "warmup" and not self.indexer_loss:
            raise ValueError(
                "model.indexer_phase is warmup, in which nothing but the indexer learns, and model.indexer_loss is 0: "
                "give it a weight, as 0.01"
            )
        return self


class DataSource(Section):
    manifest: str = Field(description="Name of a manifest in data_manifests/, or a path to one.")
    split: str = Field("train", description="Split of the manifest.")
    weight: float = Field(1.0, gt=0, description="How often an epoch passes over this source (1.0 = once).")


class DataSection(Section):
    train: tuple[DataSource, ...] = Field(description="Sources that are trained on.")
    validation: tuple[DataSource, ...] = Field((), description="Sources of eval/loss; none: no evaluation.")
    row_tokens: int = Field(1024, ge=16, description="T: tokens in a packed row.")
    mode: Literal["chat", "thinking"] = Field(
        "chat", description="DeepSeek-V4 reasoning mode of the encoding."
    )
    drop_thinking: bool = Field(True, description="Empty the reasoning of turns before the last user turn.")


class SftObjective(Section):
    kind: Literal["sft"] = "sft"


class OptimSection(Section):
    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: matrices but embedding and head by Muon, the rest by AdamW; adamw: everything by AdamW.",
    )
    lr: float = Field(1e-3, gt=0, description="Peak learning rate, of Muon and AdamW alike.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's β₁ and β₂.")
    eps: float = Field(1e-8, gt=0, description="AdamW's ε.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum factor μ (Nesterov).")
    update_rms: float = Field(
        0.18, gt=0, description="Muon: RMS of an update before the learning rate (γ of the V4 report)."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    clip_norm: float = Field(
        1.0, ge=0, description="Largest global L2 norm of the gradient; 0 = no clipping."
    )

    @model_validator(mode="after")
    def _muon_fields_need_muon(self) -> OptimSection:
        for name in ("momentum", "update_rms"):
            if self.kind == "adamw" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"optim.{name} is Muon's and would change nothing under optim.kind=adamw: "
                    f"set optim.kind=muon, or leave {name} out"
                )
        return self


class ParallelSection(Section):
    dp: int | None = Field(None, ge=1, description="Data-parallel degree; absent: every rank.")
    ep: int = Field(
        1, ge=1, description="Expert-parallel degree, a divisor of dp: so many ranks share a layer's experts."
    )
    pp: int = Field(
        1, ge=1, description="Pipeline stages; the batch of a rank goes through them in micro-batches."
    )
    virtual_stages: int = Field(
        1, ge=1, description="Runs of layers that each pipeline rank holds (interleaved schedule); 1 = 1F1B."
    )
    zero: Literal[0, 1] = Field(
        1, description="ZeRO stage: 1 shards optimizer state and master weights over dp."
    )
    offload: bool = Field(
        False, description="Keep master weights and optimizer state in host memory, and update them there."
    )


class ScheduleSection(Section):
    steps: int = Field(100, ge=1, description="Optimizer steps.")
    batch_tokens: int = Field(
        8192, ge=16, description="Tokens in a global batch, a multiple of data.row_tokens."
    )
    micro_rows: int | None = Field(
        None,
        ge=1,
        description="Rows in one forward pass of one rank; fewer rows = more gradient accumulation.",
    )
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up.")
    shape: Literal["cosine", "wsd", "constant"] = Field("cosine", description="Learning rate after warm-up.")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps in the final decay.")
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate as a share of the peak.")
    eval_every: int = Field(
        0, ge=0, description="Steps between evaluations on data.validation; 0 = at the end."
    )
    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0 = at the end only.")
    keep_last: int = Field(2, ge=1, description="Complete checkpoints to keep.")
    async_save: bool = Field(
        True,
        description="Write checkpoints beside training; the step waits only for the copy to host memory.",
    )
    max_skipped: int = Field(5, ge=1, description="Non-finite steps in a row after which the run stops.")


class ClusterSection(Section):
    accelerator: Literal["auto", "cpu", "cuda", "npu"] = Field(
        "auto", description="Device kind; auto = best found."
    )
    launcher: str = Field("local", description="How the job is started: a member of lab_utils/launchers.")
    nproc: int = Field(1, ge=1, description="Ranks on a node: one per device (910C: one per die).")
    threads: int | None = Field(None, ge=1, description="CPU threads a rank; absent: cores ÷ ranks.")


class TrackingSection(Section):
    wandb: Literal["offline", "online", "disabled"] = Field(
        "offline", description="W&B mode; offline never calls out."
    )
    project: str = Field("ascent", description="W&B project.")
    entity: str | None = Field(None, description="W&B team or user.")
    base_url: str | None = Field(None, description="W&B server; needed for online.")
    log_every: int = Field(1, ge=1, description="Steps between logged lines.")
    chip_seconds: float = Field(2.0, gt=0, description="Seconds between samples of chip utilisation.")

    @model_validator(mode="after")
    def _online_needs_a_server(self) -> TrackingSection:
        if self.wandb == "online" and not self.base_url:
            raise ValueError(
                "tracking.wandb is online but tracking.base_url is empty: name the server, or use offline"
            )
        return self


class Recipe(Section):
    """Everything that a run needs. See the module's head for use; ``Recipe.model_json_schema()`` for forms."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="First part of the run's name."
    )
    seed: int = Field(0, ge=0, description="Seed of initialisation, shuffling and every random number.")
    model: ModelSection = ModelSection()
    data: DataSection
    objective: SftObjective = SftObjective()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    schedule: ScheduleSection = ScheduleSection()
    cluster: ClusterSection = ClusterSection()
    tracking: TrackingSection = TrackingSection()

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
    def load(cls, source: str | Path) -> Recipe:
        """A named recipe of ``lab_utils/recipes``, or a YAML file."""
        path = Path(source)
        if path.suffix in (".yaml", ".yml"):
            try:
                tree = yaml.safe_load(path.read_text(encoding="utf-8"))
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
        """``(dp, micro_rows, accumulation)`` for a number of ranks.

        Raises:
            LayoutError: ranks, batch and rows do not divide; the message names the knob.
        """
        world = self.cluster.nproc if world_size is None else world_size
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
        dp = parallel.dp or world // parallel.pp
        if self.schedule.batch_tokens % T or rows == 0:
            raise LayoutError(
                f"schedule.batch_tokens={self.schedule.batch_tokens} is not a multiple of data.row_tokens={T}: "
                f"use {max(1, round(self.schedule.batch_tokens / T)) * T}."
            )
        if dp * parallel.pp != world:
            stages = f" of {parallel.pp} stages" if parallel.pp > 1 else ""
            raise LayoutError(
                f"parallel.dp={dp}{stages} does not match {world} ranks: set parallel.dp={world // parallel.pp} or "
                f"cluster.nproc={dp * parallel.pp}."
            )
        if dp % self.parallel.ep:
            raise LayoutError(
                f"parallel.ep={self.parallel.ep} does not divide the {dp} data-parallel ranks: "
                f"set it to a divisor of {dp}, or change cluster.nproc."
            )
        if rows % dp:
            raise LayoutError(
                f"A batch of {rows} rows ({self.schedule.batch_tokens} tokens) cannot be shared evenly by {dp} ranks: "
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


def _keys(section: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of a recipe, for hints."""
    keys = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            keys += _keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _explain(root: type[Section], error: ValidationError) -> str:
    """The first problem of a pydantic error as one sentence, and how many more there are."""
    problems = error.errors()
    # An unknown key explains a missing one better than the reverse.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        siblings = [
            k.rsplit(".", 1)[-1] for k in _keys(root) if k.rsplit(".", 1)[0] == key.rpartition(".")[0]
        ]
        siblings = siblings or sorted({k.split(".")[0] for k in _keys(root)})
        text = f"'{key}' is no key of a recipe, {nearest(str(first['loc'][-1]), siblings)}"
    elif first["type"] == "missing":
        text = f"'{key}' is missing; give it a value"
    else:
        found = f" (found {first['input']!r})" if key and not isinstance(first["input"], dict) else ""
        text = f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}{found}"
    more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
    return text.rstrip(".") + more + ("" if text.endswith("?") and not more else ".")
