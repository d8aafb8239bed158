"""Every layout that the engine would take, with its memory and its step: the best, and those that nothing beats.

A layout is valid if ``Recipe.layout`` and the engine's own rules say so (``placed.place``), and fits if its fullest
stage does. Tried are cp, ep, pp, virtual stages, micro-batch, checkpointing and offload; dp follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from lab_utils.errors import LayoutError
from lab_utils.models.deepseek_v4.counting import parameters_by_component
from lab_utils.planner import memory, timing
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import Cluster
from lab_utils.planner.kept import width
from lab_utils.planner.memory import StageMemory
from lab_utils.planner.placed import Placed, place
from lab_utils.planner.rates import Rates
from lab_utils.planner.timing import StepTime
from lab_utils.recipe import ParallelSection, Recipe

KINDS = ("none", "mhc", "attention", "full")  # what is made again, the least first
VIRTUAL = (1, 2, 3, 4)
MICRO_ROWS = (1, 2, 4, 8)
SHORTEST = (
    2048  # tokens of a run of a row: of shorter ones the measured rates of products and exchanges say little
)
REFUSED_KEPT = 200  # of layouts that don't fit, the nearest


@dataclass(frozen=True)
class Candidate:
    """A layout with what it costs.

    Attributes:
        recipe: the recipe with this layout in it, launchable on ``placed.ranks`` ranks.
    """

    recipe: Recipe
    placed: Placed
    stages: tuple[StageMemory, ...]
    time: StepTime
    room_gib: float

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def peak_gib(self) -> float:
        return self.fullest.peak

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.room_gib

    @cached_property
    def layout(self) -> dict[str, Any]:
        """Degrees, micro-batches, checkpointing and offload, as one line of a table."""
        recipe = self.recipe
        return {
            **self.placed.as_dict(),
            "zero": recipe.parallel.zero,
            "checkpointing": recipe.model.checkpointing,
            "offload": recipe.parallel.offload,
        }

    @property
    def name(self) -> str:
        p = self.placed
        virtual = f" v{p.virtual_stages}" if p.virtual_stages > 1 else ""
        off = " offload" if self.recipe.parallel.offload else ""
        rows = f" rows{p.micro_rows}" if p.micro_rows > 1 else ""
        runs = f" cp{p.cp}" if p.cp > 1 else ""
        return f"dp{p.dp}{runs} ep{p.ep} pp{p.pp}{virtual}{rows} {self.recipe.model.checkpointing}{off}"

    def changes(self) -> dict[str, Any]:
        """Of a recipe, by dotted key: what gives it this layout."""
        return {
            "parallel": {**self.recipe.parallel.model_dump(mode="json"), "dp": self.placed.dp},
            "schedule.micro_rows": self.placed.micro_rows,
            "model.checkpointing": self.recipe.model.checkpointing,
        }

    def as_dict(self) -> dict[str, Any]:
        """As ``lab plan --json`` has it."""
        full = self.fullest
        return {
            "layout": self.layout,
            "fits": self.fits,
            "memory_gib": {name: round(value, 3) for name, value in full.terms.items()},
            "activations_gib": {name: round(value, 3) for name, value in full.activations_by.items()},
            "memory_peak_gib": round(full.peak, 3),
            "memory_stage": full.index,
            "memory_moment": full.moment,
            "host_gib": round(full.host, 3),
            "step_s": round(self.time.seconds, 4),
            "step_terms_s": {name: round(value, 4) for name, value in self.time.terms.items()},
            "tokens_per_s": round(self.time.tokens_per_s, 1),
            "mfu": round(self.time.mfu, 4),
            "mfu_all_trained": round(self.time.mfu_trained, 4),
            "mfu_denominator_tflops": self.time.peak_tflops,
            "binding": self.time.binding,
        }


def evaluate(recipe: Recipe, cluster: Cluster, ranks: int, assumed: Assumptions) -> Candidate:
    """The recipe's own layout on so many ranks.

    Raises:
        LayoutError: the engine would refuse it. One that doesn't fit is returned: ``fits`` says so.
    """
    placed, rates = place(recipe, ranks), Rates(cluster, assumed)
    stages = memory.of_placed(recipe, placed, cluster, assumed)
    time = timing.of_placed(recipe, placed, rates)
    return Candidate(recipe, placed, tuple(stages), time, cluster.device.memory_gib.value)


@dataclass(frozen=True)
class Found:
    """Layouts of a search.

    Attributes:
        fitting: those that fit, the fastest first.
        refused: of those that don't, the ones that need least, at most ``REFUSED_KEPT``: ``(layout, GiB)``.
        bounds: what is in ``refused`` are lower bounds, since no layout was worth looking at more closely.
        tried, invalid: how many were looked at, and how many the engine would refuse.
        why: the first refusal of the engine's.
    """

    fitting: tuple[Candidate, ...]
    refused: tuple[tuple[Recipe, float], ...]
    tried: int
    invalid: int
    why: str = ""
    bounds: bool = False

    @property
    def best(self) -> Candidate | None:
        return self.fitting[0] if self.fitting else None

    def front(self) -> list[Candidate]:
        """Those of which no other is faster and needs less memory, the fastest first."""
        found: list[Candidate] = []
        least = float("inf")
        for candidate in self.fitting:
            if candidate.peak_gib < least:
                found.append(candidate)
                least = candidate.peak_gib
        return found


def search(
    recipe: Recipe,
    cluster: Cluster,
    ranks: int,
    assumed: Assumptions | None = None,
    *,
    offload: bool | None = None,
) -> Found:
    """All layouts of ``recipe`` on so many ranks; a degree that the recipe names isn't kept, its batch and rows are.

    Args:
        offload: only with it, or only without; absent: both on devices, where the optimizer can be offloaded.
    """
    recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"auto": False})})
    rates = Rates(cluster, assumed or Assumptions())
    room = cluster.device.memory_gib.value
    fitting: list[Candidate] = []
    refused: list[tuple[Recipe, float]] = []
    bounds: list[tuple[Recipe, float]] = []
    tried = invalid = 0
    why = ""
    for parallel in _degrees(recipe, cluster, ranks, offload):
        base = recipe.model_copy(update={"parallel": parallel})
        heavy = _floor(recipe, parallel)
        if heavy > room:  # no cut of the layers and no checkpointing helps
            tried += 1
            bounds.append((base, heavy))
            continue
        known = False
        for rows in MICRO_ROWS:
            schedule = recipe.schedule.model_copy(update={"micro_rows": rows})
            laid = base.model_copy(update={"schedule": schedule})
            tried += 1
            try:
                placed = place(laid, ranks)
            except LayoutError as error:
                invalid, why = invalid + 1, why or str(error)
                continue
            heavy, known = (heavy if known else memory.least(laid, placed, rates.assumed)), True
            if heavy > room:
                bounds.append((laid, heavy))
                break
            for kind in KINDS:
                model = recipe.model.model_copy(update={"checkpointing": kind})
                candidate_recipe = laid.model_copy(update={"model": model})
                stages = memory.of_placed(candidate_recipe, placed, cluster, rates.assumed)
                peak = max(stage.peak for stage in stages)
                if peak > room:
                    refused.append((candidate_recipe, peak))
                else:
                    step = timing.of_placed(candidate_recipe, placed, rates)
                    fitting.append(Candidate(candidate_recipe, placed, tuple(stages), step, room))
    fitting.sort(key=lambda each: (each.time.seconds, each.peak_gib))
    nearest = sorted(refused or bounds, key=lambda each: each[1])[:REFUSED_KEPT]
    return Found(tuple(fitting), tuple(nearest), tried, invalid, why, bounds=not refused)


def _degrees(recipe: Recipe, cluster: Cluster, ranks: int, offload: bool | None) -> Iterator[ParallelSection]:
    """Degrees that divide; what else they must do ``place`` checks."""
    from lab_utils.planner.numbers import numbers

    n = numbers(recipe.model.source)
    offs = (False, True) if offload is None and cluster.kind != "cpu" else (bool(offload),)
    for pp in divisors(ranks):
        if pp > n.num_hidden_layers:
            break
        dp = ranks // pp
        for ep in divisors(n.n_routed_experts):
            if dp % ep:
                continue
            for v in VIRTUAL if pp > 1 else (1,):
                if pp * v > n.num_hidden_layers:
                    break
                for cp, off in product(_cuts(recipe, dp), offs):
                    changes = {"dp": None, "cp": cp, "pp": pp, "ep": ep, "virtual_stages": v, "offload": off}
                    yield recipe.parallel.model_copy(update=changes)


def _cuts(recipe: Recipe, data_ranks: int) -> list[int]:
    """Over how many ranks a row may be cut: powers of two that leave runs long enough."""
    found, T = [1], recipe.data.row_tokens
    if recipe.objective.kind != "sft":
        return found
    while data_ranks % (2 * found[-1]) == 0 and T // (2 * found[-1]) >= SHORTEST:
        found.append(2 * found[-1])
    return found


def _floor(recipe: Recipe, parallel: ParallelSection) -> float:
    """GiB of weights and gradients of the mean stage: the fullest has no less."""
    from lab_utils.planner.numbers import numbers

    parts = parameters_by_component(numbers(recipe.model.source))  # type: ignore[arg-type]
    experts = parts["routed experts"]
    layers = sum(parts.values()) - experts - parts["embedding"] - parts["head"]
    bytes_each = width(recipe.model.dtype) + 4
    return bytes_each * (experts / parallel.ep + layers) / parallel.pp / memory.GIB


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
