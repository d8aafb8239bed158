"""How the engine would lay a recipe out over a number of ranks: the same rules, without torch and without the ranks.

Degrees and batch are checked by ``Recipe.layout``, layers dealt out by ``counting.split_layers``, experts by their
number: what is refused here is what the engine refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

from lab_utils.errors import LayoutError
from lab_utils.models.deepseek_v4.counting import check_parts, split_layers
from lab_utils.planner.numbers import Numbers, numbers
from lab_utils.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One pipeline rank's layers: ranges ``[start, stop)``, one for each of its virtual stages."""

    index: int
    ranges: tuple[tuple[int, int], ...]
    first: bool
    last: bool

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for start, stop in self.ranges for layer in range(start, stop))


@dataclass(frozen=True)
class Placed:
    """A recipe on ranks.

    Attributes:
        dp: ranks with rows of their own; ``data_ranks``: with tokens of their own, over which state is cut.
        passes: micro-batches of a rank in a step; ``micro_tokens``: tokens of each.
        mtp: whether multi-token prediction is trained; its block stands on the last stage.
    """

    numbers: Numbers
    ranks: int
    dp: int
    cp: int
    ep: int
    pp: int
    virtual_stages: int
    micro_rows: int
    passes: int
    row_tokens: int
    mtp: bool
    stages: tuple[Stage, ...]

    @property
    def moe_dp(self) -> int:
        return self.data_ranks // self.ep

    @property
    def data_ranks(self) -> int:
        return self.dp * self.cp

    @property
    def micro_tokens(self) -> int:
        return self.micro_rows * self.row_tokens // self.cp

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.data_ranks * self.passes * self.micro_tokens

    def as_dict(self) -> dict[str, int]:
        return {
            "ranks": self.ranks,
            "dp": self.dp,
            "cp": self.cp,
            "ep": self.ep,
            "pp": self.pp,
            "virtual_stages": self.virtual_stages,
            "moe_dp": self.moe_dp,
            "micro_rows": self.micro_rows,
            "micro_batches": self.passes,
        }

    def in_flight(self, stage: int) -> float:
        """Micro-batches whose activations a pipeline rank holds at once, in whole passes through all of its layers.

        1F1B: as many as there are stages from this one on. Interleaved (``pipeline/schedule/interleaved_pp.py`` of
        ColossalAI): ``2·(stages behind) + (chunks - 1)·stages + 1`` chunks of a pass.
        """
        if self.pp == 1:
            return 1.0
        v = self.virtual_stages
        if v == 1:
            return float(min(self.pp - stage, self.passes))
        chunks = min(2 * (self.pp - stage - 1) + (v - 1) * self.pp + 1, self.passes * v)
        return chunks / v


def place(recipe: Recipe, ranks: int | None = None) -> Placed:
    """The layout that the engine would make of ``recipe`` on so many ranks.

    Raises:
        LayoutError: it would refuse; the message names the knob.
        RecipeError: the model isn't one the planner knows.
    """
    ranks = recipe.cluster.world_size if ranks is None else ranks
    dp, micro, passes = recipe.layout(ranks)
    parallel, n = recipe.parallel, numbers(recipe.model.source)
    if n.n_routed_experts % parallel.ep:
        raise LayoutError(
            f"parallel.ep={parallel.ep} does not divide the model's {n.n_routed_experts} experts: use a divisor of "
            f"{n.n_routed_experts}."
        )
    check_parts(n, recipe.data.row_tokens, parallel.cp)
    mtp = recipe.model.mtp_loss > 0 and n.num_nextn_predict_layers > 0
    trained_mtp = mtp and recipe.model.indexer_phase != "warmup"
    stages = deal_layers(n, parallel.pp, parallel.virtual_stages, trained_mtp)
    return Placed(
        numbers=n,
        ranks=ranks,
        dp=dp,
        cp=parallel.cp,
        ep=parallel.ep,
        pp=parallel.pp,
        virtual_stages=parallel.virtual_stages,
        micro_rows=micro,
        passes=passes,
        row_tokens=recipe.data.row_tokens,
        mtp=mtp,
        stages=stages,
    )


@cache
def deal_layers(n: Numbers, pp: int, virtual_stages: int, mtp: bool) -> tuple[Stage, ...]:
    """Layers of each pipeline rank; virtual stage i lies on rank i mod pp."""
    if pp == 1:
        return (Stage(0, ((0, n.num_hidden_layers),), first=True, last=True),)
    upto = [0]
    for count in split_layers(n, pp * virtual_stages, mtp=mtp):
        upto.append(upto[-1] + count)
    runs = list(pairwise(upto))
    return tuple(Stage(s, tuple(runs[s::pp]), s == 0, s == pp - 1) for s in range(pp))
