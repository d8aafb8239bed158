"""From a recipe, a cluster and a number of chips to a layout: what fits, how fast it will go, and why.

    from lab_utils.planner.plan import plan

    p = plan("v4_pro_sft", "ascend-910c", 1024)
    p.best.name, p.best.time.seconds, p.best.peak_gib
    p.table()            # the fastest layouts
    p.front()            # those that nothing beats in both time and memory
    p.advice()           # what one change would give, as sentences
    launch(p.to_recipe())

Everything is predicted from counts and from the cluster's figures (``docs/planner.md``); nothing was run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.errors import LayoutError
from lab_utils.models.deepseek_v4 import counting
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.auto import chosen
from lab_utils.planner.cluster import Case, Cluster, find
from lab_utils.planner.memory import TERMS
from lab_utils.planner.numbers import numbers
from lab_utils.planner.search import Candidate, Found, evaluate, search
from lab_utils.planner.timing import GROUPS, flops_per_token
from lab_utils.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd

    from lab_utils.planner.advice import Reach

SHOWN = 12  # layouts of a table


@dataclass(frozen=True)
class Plan:
    """Layouts of a recipe on so many chips of a cluster."""

    recipe: Recipe
    cluster: Cluster
    chips: int
    assumed: Assumptions
    found: Found

    @property
    def ranks(self) -> int:
        return self.cluster.devices(self.chips)

    @property
    def best(self) -> Candidate | None:
        """The fastest layout that fits."""
        return self.found.best

    @property
    def fits(self) -> bool:
        return self.best is not None

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All that fit, the fastest first."""
        return self.found.fitting

    def front(self) -> list[Candidate]:
        """Those of which no other is faster and needs less memory."""
        return self.found.front()

    def table(self, candidates: Sequence[Candidate] | None = None) -> pd.DataFrame:
        """A row a layout: the fastest, or those given."""
        import pandas as pd

        chosen = self.candidates[:SHOWN] if candidates is None else candidates
        rows = [
            {
                "layout": each.name,
                "step, s": round(each.time.seconds, 2),
                "tokens/s": round(each.time.tokens_per_s),
                "MFU, %": round(100 * each.time.mfu, 1),
                "GiB of a device": round(each.peak_gib, 1),
                "binding": each.time.binding,
            }
            for each in chosen
        ]
        return pd.DataFrame(rows)

    def memory(self, candidate: Candidate | None = None) -> pd.DataFrame:
        """GiB by term, a row a pipeline stage."""
        import pandas as pd

        stages = self._chosen(candidate).stages
        return pd.DataFrame([stage.terms for stage in stages], columns=list(TERMS)).rename_axis("stage")

    def step(self, candidate: Candidate | None = None) -> pd.DataFrame:
        """Seconds by term, and their share of the step."""
        import pandas as pd

        time = self._chosen(candidate).time
        rows = {
            GROUPS[name]: (value, 100 * value / time.seconds) for name, value in time.terms.items() if value
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=["s", "%"])

    def advice(self, candidate: Candidate | None = None) -> list[str]:
        """What one change of the layout, the batch or the software would give, the most effective first."""
        from lab_utils.planner.advice import advice

        if self.best is None:
            return self.knobs()
        return advice(self._chosen(candidate), self.cluster, self.assumed)

    def knobs(self) -> list[str]:
        """Where nothing fits: by how much, and what would make room."""
        if self.fits:
            return []
        if not self.found.refused:
            return [self.found.why]
        nearest, gib = self.found.refused[0]
        room = self.cluster.device.memory_gib.value
        where = nearest.parallel
        found = [
            f"Nothing fits {room:.0f} GiB: the nearest layout (ep {where.ep}, pp {where.pp}, checkpointing "
            f"{nearest.model.checkpointing}) needs {'at least ' if self.found.bounds else ''}{gib:.1f} GiB."
        ]
        if self.found.bounds and self.found.why:
            found.append(f"The engine refuses {self.found.invalid} others, the first since: {self.found.why}")
        if self.recipe.optim.kind == "adamw":
            found.append(
                "optim.kind=muon keeps 4 bytes of optimizer state a parameter of its matrices, not 8."
            )
        more = -(-int(self.chips * gib / room) // self.cluster.chips_per_node) * self.cluster.chips_per_node
        found.append(f"--chips {more} cuts weights and gradients further.")
        return found

    @cached_property
    def range(self) -> dict[Case, Candidate]:
        """The best layout at the low, the expected and the high end of the cluster's efficiencies."""
        if self.best is None:
            return {}
        cases: tuple[Case, ...] = ("low", "expected", "high")
        return {
            case: evaluate(self.best.recipe, self.cluster, self.ranks, self.assumed.but(case=case))
            for case in cases
        }

    def reach(self, mfu: float) -> Reach:
        """What would have to be true for a share of the peak, as 0.4; ``.sentences()`` says it."""
        from lab_utils.planner.advice import reach

        return reach(self.recipe, self.cluster, self.ranks, self.assumed, mfu)

    def crossings(self, candidate: Candidate | None = None) -> list[str]:
        """What of the layout leaves a SuperPoD (or a node), as sentences."""
        from lab_utils.planner.questions import crossings

        return crossings(self._chosen(candidate).placed, self.cluster)

    def to_recipe(self, candidate: Candidate | None = None) -> Recipe:
        """The recipe with the layout in it, and nodes and ranks of the cluster: to be launched.

        Raises:
            LayoutError: nothing fits.
        """
        nodes, nproc = self.cluster.nodes(self.chips)
        places = {
            "cluster.nodes": nodes,
            "cluster.nproc": nproc,
            "cluster.accelerator": self.cluster.kind,
        }
        return self.recipe.with_changes(self._chosen(candidate).changes() | places)

    def as_dict(self, shown: int = 20) -> dict[str, Any]:
        """What ``lab plan --json`` prints."""
        n, length = numbers(self.recipe.model.source), self.recipe.data.row_tokens
        parts = counting.parameters_by_component(n)  # type: ignore[arg-type]
        mtp = counting.parameters_mtp(n) if self.recipe.model.mtp_loss else 0  # type: ignore[arg-type]
        active = counting.active_parameters(n) + parts["embedding"]  # type: ignore[arg-type]
        best = self.best.as_dict() if self.best else None
        return {
            "recipe": self.recipe.name,
            "cluster": self.cluster.name,
            "chips": self.chips,
            "ranks": self.ranks,
            "parameters": sum(parts.values()) + mtp,
            "active_parameters": active,
            "flops_per_token": flops_per_token(self.recipe, length),
            "tokens_per_step": self.recipe.schedule.batch_tokens,
            "fits": self.fits,
            "best": best,
            "range": {
                case: {"step_s": round(each.time.seconds, 3), "mfu": round(each.time.mfu, 4)}
                for case, each in self.range.items()
            },
            "candidates": [each.as_dict() for each in self.candidates[:shown]],
            "front": [each.as_dict() for each in self.front()],
            "advice": self.advice(),
            "tried": self.found.tried,
            "refused_by_the_engine": self.found.invalid,
            "assumptions": {name: getattr(self.assumed, name) for name in self.assumed.__dataclass_fields__},
            "predicted": True,
        }

    def _chosen(self, candidate: Candidate | None) -> Candidate:
        if candidate is not None:
            return candidate
        if self.best is None:
            raise LayoutError(" ".join(self.knobs()))
        return self.best


def plan(
    recipe: Recipe | str | Path,
    cluster: Cluster | str | Path = "ascend-910c",
    chips: int | None = None,
    *,
    assumed: Assumptions | None = None,
    offload: bool | None = None,
) -> Plan:
    """The plan of a recipe, by name, file or object.

    Args:
        cluster: a name, a YAML file or a ``Cluster``.
        chips: what is bought and counted, a 910C being two devices; absent: as many as the recipe's cluster section.
        assumed: what the prediction takes for granted; absent: the engine as it is.
        offload: look only at layouts with the optimizer in host memory, or only at those without.

    Raises:
        RecipeError: no such recipe, cluster or model.
        LayoutError: chips that are no whole nodes.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    where, assumed = find(cluster), assumed or Assumptions()
    if chips is None:
        chips = max(1, recipe.cluster.world_size // where.devices_per_chip)
    ranks = where.devices(chips)
    return Plan(recipe, where, chips, assumed, search(recipe, where, ranks, assumed, offload=offload))


def check(
    recipe: Recipe,
    cluster: Cluster | str | Path,
    chips: int | None = None,
    *,
    assumed: Assumptions | None = None,
) -> Candidate:
    """The cost of the recipe's own layout, as it would be launched.

    Raises:
        LayoutError: the engine would refuse it, or it doesn't fit; the message names the stage, its largest terms and
            what to change.
    """
    where = find(cluster)
    ranks = where.devices(chips) if chips else recipe.cluster.world_size
    found = evaluate(chosen(recipe, where, ranks), where, ranks, assumed or Assumptions())
    if not found.fits:
        raise LayoutError(out_of_memory(found, where))
    return found


def out_of_memory(found: Candidate, cluster: Cluster, then: str = "lab plan without --as-is") -> str:
    """Why a layout doesn't fit, as a sentence; ``then``: what searches for one that does."""
    full = found.fullest
    largest = sorted(full.terms, key=lambda name: -full.terms[name])[:3]
    terms = ", ".join(f"{name} {full.terms[name]:.1f}" for name in largest)
    again = "" if found.recipe.model.checkpointing == "full" else "model.checkpointing=full, "
    knob = {
        "activations": f"{again}fewer micro-rows, or rows cut over more ranks (parallel.cp)",
        "streams": "rows cut over more ranks (parallel.cp), or fewer micro-rows",
        "temporary": "fewer schedule.micro_rows",
        "masters": "more chips, or parallel.offload",
        "moments": "more chips, or parallel.offload",
    }.get(largest[0], "a larger parallel.pp or parallel.ep")
    return (
        f"{found.name} needs {full.peak:.1f} GiB on the devices of stage {full.index}, and one of {cluster.name} has "
        f"{found.room_gib:.0f} ({terms}): try {knob}; {then} searches for a layout that fits."
    )
