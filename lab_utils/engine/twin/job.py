"""The engine on one rank of a job that is not there: built as a run builds it, then a whole step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lab_utils.data.rows import PackedRows
from lab_utils.engine import colossal
from lab_utils.engine.clock import StepClock
from lab_utils.engine.control import Stop
from lab_utils.engine.engine import Engine
from lab_utils.engine.feeds import Feed
from lab_utils.engine.parts import Parts, model_of
from lab_utils.engine.twin.device import Nowhere
from lab_utils.models.deepseek_v4.counting import split_layers
from lab_utils.models.deepseek_v4.materialise import _put
from lab_utils.models.deepseek_v4.pipeline import held_modules
from lab_utils.objectives import get_objective
from lab_utils.optim.dealing import even_shards
from lab_utils.optim.groups import matrices, rule
from lab_utils.recipe import Recipe


class Rows:
    """A loader of rows in which each is one document and every token bears loss: the most that a step can hold."""

    epoch = 0.0

    def __init__(self, rows: int, tokens: int) -> None:
        self.rows, self.tokens = rows, tokens

    def next_step(self) -> PackedRows:
        shape = (self.rows, self.tokens)
        position_ids = torch.arange(self.tokens).repeat(self.rows, 1)
        none = torch.zeros(shape, dtype=torch.int64)
        return PackedRows(none, position_ids, none.clone(), (position_ids > 0).float())

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Job(Engine):
    """An engine whose run has no folder, whose weights have no values and whose other ranks don't answer."""

    def __init__(self, recipe: Recipe, device: str, ranks: int, rank: int) -> None:
        super().__init__(recipe, Nowhere(device), SimpleNamespace(path=None), _parts)
        self.world, self.rank = ranks, rank

    def open(self) -> None:
        """As the engine's own, without data, files, telemetry and what is asked of a real device."""
        self.device = self.accelerator.setup()
        self.dp, self.micro_rows, self.accumulation = self.recipe.layout(self.world)
        self.layout = colossal.plugin(self.recipe.parallel, self.micro_rows)
        self.clock = StepClock(self.accelerator.synchronize)
        self.writer = SimpleNamespace(failed=False, look=lambda: None)

    def fill(self) -> None:
        """Parts, model, optimizer: to be called where tensors are fake."""
        self.assemble(None)
        self.feed = Feed(self)

    def make_states(self) -> None:
        """An update by gradients of nothing, after which the optimizer's states exist: the next step is like any but a
        run's first."""
        self.optimizer._local_touched = [True] * len(self.optimizer.places)
        self.optimizer.gradient_norm()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Load, forward-backward, update, as the loop has them."""
        micro_batches = self.load(Stop.NO)
        metrics = self.forward_backward(micro_batches)
        self.update(metrics)


def _parts(
    recipe: Recipe,
    accelerator: Any,
    run_dir: Any,
    *,
    rank: int,
    world: int,
    device: torch.device,
    source: str | None,
) -> Parts:
    """The parts of a rank, its weights without values."""
    section = recipe.model
    model = model_of(recipe, device=device, defer=True)
    model.materialise = lambda: _fill(model, getattr(torch, section.dtype), device)
    # Every tensor is made where it belongs, and torch does not swap the memory of fake parameters.
    model.to = lambda *args, **kwargs: model
    rows = recipe.rows_per_step // world
    return Parts(
        model=model,
        train=Rows(rows, recipe.data.row_tokens),
        objective=get_objective(recipe.objective, recipe.rollout),
        write_config=lambda folder: None,
    )


def _fill(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Memory for what this rank holds of the model, each tensor in the dtype that a real one would have."""

    def put(name: str, like: Tensor) -> None:
        exact = not like.is_floating_point() or name.endswith("e_score_correction_bias")
        value = torch.empty(like.shape, dtype=like.dtype if exact else dtype, device=device)
        _put(model, name, value, dtype=value.dtype, device=device)

    for name, tensor in [*model.state_dict(keep_vars=True).items(), *model.named_buffers()]:
        if tensor.is_meta:
            put(name, tensor)
    model.materialise = None


def shards_of_every_stage(job: Job) -> list[tuple[int, int]]:
    """Over how many ranks each stage of the pipeline could deal out Muon's matrices, dense ones and experts: what the
    stages tell one another before the optimizer is made."""
    layout, recipe, model = job.layout, job.recipe, job.parts.model
    stages = layout.stage_manager
    if stages is None:
        return []
    parts = layout.pp_size * recipe.parallel.virtual_stages
    counts = split_layers(model.config, parts, mtp=bool(model.trained_mtp))
    said = []
    for stage in range(layout.pp_size):
        found = stages.get_stage_index(counts, stage=stage)
        ranges = found if stages.is_interleave else [found]
        held = _prefixes(model, ranges, stage == 0, stage == layout.pp_size - 1)
        sizes: tuple[list[int], list[int]] = ([], [])
        for name, shape in model.whole_shapes.items():
            experts = len(shape) == 3
            shape = (shape[0] // layout.ep_size, *shape[1:]) if experts else shape
            if model.warmup and ".indexer." not in name:
                continue
            if name.startswith(held) and rule(name, shape, model.config, recipe.optim)[0] == "muon":
                sizes[experts and layout.ep_size > 1].extend(
                    v.size for v in matrices(name, shape, model.config)
                )
        ranks = layout.dp_size, layout.moe_dp_size
        said.append(tuple(even_shards(each, n) for each, n in zip(sizes, ranks, strict=True)))
    return said


def _prefixes(model: Any, ranges: list[tuple[int, int]], first: bool, last: bool) -> tuple[str, ...]:
    """How the names begin of what ``pipeline.held_modules`` leaves a stage."""
    names = {module: name for name, module in model.named_modules()}
    return tuple(f"{names[module]}." for module in held_modules(model, ranges, first, last))
