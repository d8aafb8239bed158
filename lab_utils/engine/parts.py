"""What a run is made of, built from its recipe: model, loaders, objective, telemetry."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lab_utils.accelerators import Accelerator, Peak
from lab_utils.objectives import Objective, get_objective
from lab_utils.optim.groups import parameter_groups
from lab_utils.recipe import OptimSection, Recipe
from lab_utils.registry import load as load_member
from lab_utils.telemetry.alerts import HOT, Alerts, Limits
from lab_utils.telemetry.chips import ChipSampler, joules_per_token
from lab_utils.telemetry.sinks import MultiSink, make_sinks


class Telemetry:
    """The sinks and the chip sampler of one rank: of the first rank everything, of the first rank of another node its
    chips, of any other rank nothing."""

    def __init__(self, sinks: MultiSink, sampler: ChipSampler | None = None, node: int = 0) -> None:
        self.sinks, self.sampler, self.node = sinks, sampler, node
        self.event, self._open = sinks.event, False
        self._alerts: Alerts | None = None

    def open(self, run_dir: Any, recipe: Recipe, accelerator: Accelerator, peak: Peak) -> None:
        if not self.sinks.sinks and self.sampler is None:
            return
        device = {"kind": accelerator.name, "device": accelerator.device_name()}
        provenance = _read_json(run_dir.path / "provenance.json")
        provenance["accelerator"] = {**device, "peak_flops": peak.flops, "peak_source": peak.source}
        self.sinks.open(run_dir.path, recipe, provenance)
        self._open = True
        if self.node == 0:
            self._alerts = Alerts(self.event, Limits(hot=HOT.get(accelerator.name))).start()
        if self.sampler:
            self.sampler.listener = self._alerts.chips if self._alerts else None
            self.sampler.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """A line of the run on its first rank; another node adds what its chips did meanwhile."""
        if not self._open:
            return
        chips = self.sampler.latest() if self.sampler else {}
        if self.node:
            self.sinks.log(step, chips)
            return
        values = {**values, **chips}
        self.sinks.log(step, {**values, **joules_per_token(values)})
        if self._alerts:
            self._alerts.step(step, values)

    def close(self, state: str) -> None:
        """Idempotent: a run that fails closes from where it failed."""
        if self._open:
            self._open = False
            if self._alerts:
                self._alerts.stop()
            if self.sampler:
                self.sampler.stop()
            self.sinks.close(state)


def telemetry_of(recipe: Recipe, accelerator: Accelerator, run_dir: Any) -> Telemetry:
    """What this rank tells, by its place in torchrun's environment."""
    if int(os.environ.get("LOCAL_RANK", 0)) != 0:
        return Telemetry(MultiSink([]))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    node = int(os.environ.get("GROUP_RANK", int(os.environ.get("RANK", 0)) // beside))
    sampler = ChipSampler(
        accelerator.name, recipe.tracking.chip_seconds, run_dir.path, chips=beside, node=node
    )
    return Telemetry(make_sinks(recipe, node=node), sampler, node)


@dataclass
class Parts:
    """Everything that the loop uses and does not make."""

    model: torch.nn.Module
    train: Any  # a PackedLoader
    objective: Objective
    write_config: Callable[[Path], None]  # puts beside a checkpoint's tensors what else transformers needs
    validation: Any | None = None
    telemetry: Telemetry = field(default_factory=lambda: Telemetry(MultiSink([])))
    questions: list[dict[str, Any]] = field(default_factory=list)  # held out: rows of format prompt
    encoding: Any = None

    def optimizer(self, section: OptimSection) -> torch.optim.Optimizer:
        groups = parameter_groups(self.model, section)
        return load_member("lab_utils.optim", section.kind).build(groups, section)


def model_of(recipe: Recipe, source: str | None = None, **options: Any) -> Any:
    """The recipe's model, with all of its training signals; ``options`` of ``load_model`` overrule the recipe."""
    from lab_utils.models.load import load_model

    section = recipe.model
    signals = ("indexer_loss", "indexer_phase", "mtp_loss", "balance_loss", "balance_rate", "checkpointing")
    settings = {name: getattr(section, name) for name in signals}
    settings |= {"dtype": section.dtype, "seed": recipe.seed, "scored": recipe.objective.kind == "reward"}
    return load_model(source or section.source, **settings | options)


def build_parts(
    recipe: Recipe,
    accelerator: Accelerator,
    run_dir: Any,
    *,
    rank: int,
    world: int,
    device: Any,
    source: str | None,
) -> Parts:
    """The parts of one rank.

    Args:
        source: where weights come from instead of ``recipe.model.source``: a checkpoint's ``model`` folder.
    """
    from lab_utils.data.documents import encoding_of
    from lab_utils.data.manifest import of_source
    from lab_utils.data.tokenizer import load_tokenizer
    from lab_utils.models.load import load_tokenizer_path
    from lab_utils.rollouts.prompts import build_prompts

    section = recipe.model
    model = model_of(recipe, source, device=device, defer=True)
    tokenizer = load_tokenizer(section.tokenizer or load_tokenizer_path(section.source))
    shared = {"rank": rank, "world_size": world}
    # Held-out prompts are answered and verified, whatever is trained on; other data has the objective's loss.
    formats = [of_source(source).format for source in recipe.data.validation]
    held_out = list(zip(recipe.data.validation, formats, strict=True))
    asked = [source for source, format in held_out if format == "prompt"]
    texts = [source for source, format in held_out if format != "prompt"]

    def write(folder: Path) -> None:
        write_config_of(model, folder)
        tokenizer.save(folder)

    return Parts(
        model=model,
        train=build_prompts(recipe, tokenizer)
        if recipe.rollout
        else _loader(recipe)(recipe, tokenizer, sources=recipe.data.train, train=True, **shared),
        validation=_loader(recipe)(recipe, tokenizer, sources=texts, train=False, **shared)
        if texts
        else None,
        questions=[row for source in asked for row in of_source(source).rows(source.split)],
        encoding=encoding_of(recipe, tokenizer),
        objective=get_objective(recipe.objective, recipe.rollout),
        write_config=write,
        telemetry=telemetry_of(recipe, accelerator, run_dir),
    )


def _loader(recipe: Recipe) -> Callable[..., Any]:
    """Who makes the rows that the recipe's objective reads."""
    from lab_utils.data.loader import build_loader
    from lab_utils.data.pairs import build_pair_loader

    return build_pair_loader if recipe.objective.kind in ("preference", "reward") else build_loader


def write_config_of(model: Any, folder: Path) -> None:
    """``config.json`` of a model, of which this rank holds some matrices."""
    from lab_utils.models.load import write_config

    write_config(model.config, next(p.dtype for p in model.parameters() if p.ndim == 2), folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
