"""Memory of a device, stage by stage and term by term, for exactly what the engine does.

    for stage in stage_memory(recipe, ranks=2048):
        print(stage.index, stage.peak, stage.terms)

Terms in GiB: ``weights``, ``gradients`` (fp32), ``masters``, ``moments``; ``activations`` (kept for the backward passes
of all micro-batches in flight), ``streams`` (what stages hand on, get and hold), ``exchange`` (all-to-all),
``temporary`` (the largest working set at the peak). What only a device has: ``communicators``, ``runtime``, ``slack``.
The peak is either in a backward pass or in the optimizer's step; the terms are those of that moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import ceil
from typing import TYPE_CHECKING

from lab_utils.planner import kept
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.numbers import Numbers
from lab_utils.planner.placed import Placed, Stage, place
from lab_utils.planner.state import State, state_of
from lab_utils.recipe import Recipe
from lab_utils.recipe.sections import ModelSection

if TYPE_CHECKING:
    from lab_utils.planner.cluster import Cluster

GIB = 2**30
LEAST_BUFFER = 64  # MB of HCCL's buffers
SEEN_BY_TWIN = (
    "weights",
    "gradients",
    "masters",
    "moments",
    "activations",
    "streams",
    "exchange",
    "temporary",
)
TERMS = (*SEEN_BY_TWIN, "communicators", "runtime", "slack")


@dataclass(frozen=True)
class StageMemory:
    """One pipeline stage's device; sizes in GiB.

    Attributes:
        terms: by the names of ``TERMS``; they add up to ``peak``.
        activations_by: what the activations are of.
        moment: when the peak is, ``backward`` or ``optimizer``.
        host: masters and moments kept in host memory (``parallel.offload``).
    """

    index: int
    layers: tuple[tuple[int, int], ...]
    in_flight: float
    parameters: int
    terms: dict[str, float]
    activations_by: dict[str, float] = field(default_factory=dict)
    moment: str = "backward"
    host: float = 0.0

    @property
    def peak(self) -> float:
        return sum(self.terms.values())

    @property
    def seen_by_twin(self) -> float:
        """Without what only a device has: driver, communicators, the allocator's slack."""
        return sum(self.terms[name] for name in SEEN_BY_TWIN)


def stage_memory(
    recipe: Recipe,
    ranks: int | None = None,
    *,
    cluster: Cluster | None = None,
    assumed: Assumptions | None = None,
) -> list[StageMemory]:
    """A row for each pipeline stage.

    Args:
        ranks: absent: of the recipe's own cluster section.
        cluster: adds what a device of it takes beside the tensors; absent: those terms are 0.
        assumed: absent: the engine as it is, with even experts. What uneven ones take stands under ``slack``.

    Raises:
        LayoutError: the engine would refuse the layout.
    """
    assumed = assumed or Assumptions(imbalance=1.0)
    placed = place(recipe, ranks)
    return of_placed(recipe, placed, cluster, assumed)


def of_placed(
    recipe: Recipe, placed: Placed, cluster: Cluster | None, assumed: Assumptions
) -> list[StageMemory]:
    return [_stage(recipe, placed, stage, cluster, assumed) for stage in placed.stages]


def least(recipe: Recipe, placed: Placed, assumed: Assumptions) -> float:
    """GiB of what no choice of micro-batch or checkpointing changes, on the fullest stage: for a quick no."""
    found = []
    for stage in placed.stages:
        state = _state(recipe, placed, stage)
        found.append(sum(_persistent(recipe, state, assumed)[0].values()))
    return max(found) / GIB


def _state(recipe: Recipe, placed: Placed, stage: Stage) -> State:
    scored = recipe.objective.kind == "reward"
    muon = recipe.optim.kind == "muon"
    return state_of(placed, stage.index, muon=muon, zero=recipe.parallel.zero, scored=scored)


def _stage(
    recipe: Recipe, placed: Placed, stage: Stage, cluster: Cluster | None, assumed: Assumptions
) -> StageMemory:
    n, model, tokens = placed.numbers, recipe.model, placed.micro_tokens
    on_cpu = (cluster.kind if cluster else recipe.cluster.accelerator) == "cpu"
    state = _state(recipe, placed, stage)
    persistent, host = _persistent(recipe, state, assumed)
    persistent["weights"] += sum(kept.buffers(n, hashed) for _, hashed in _kinds(n, stage))
    flying = placed.in_flight(stage.index)
    kinds = _kinds(n, stage)
    by = _activations(n, model, placed.row_tokens, placed.ep, placed.cp, kinds, stage.last, placed.mtp)
    share = {name: flying * tokens * a_token for name, a_token in by.items()}
    streams = 0.0
    if placed.pp > 1:
        # Of each micro-batch in flight what came in, the first layer's input; and gradients of what comes and goes.
        one = n.hc_mult * n.hidden_size * kept.width(model.dtype) * tokens
        came = placed.virtual_stages - stage.first
        share["streams"] -= flying * came * one
        streams = (flying * came + (not stage.first) + (not stage.last)) * one
    rows = kept.exchange(n, model.dtype, placed.ep) * tokens
    backward = {
        "activations": sum(share.values()),
        "streams": streams,
        "exchange": rows,
        "temporary": _temporary(recipe, placed, stage, rows, on_cpu),
    }
    step = {"activations": 0.0, "streams": 0.0, "exchange": 0.0, "temporary": _step_temporary(recipe, state)}
    in_backward = sum(backward.values()) >= sum(step.values())
    terms = {**persistent, **(backward if in_backward else step)}
    uneven = (
        (assumed.imbalance - 1.0) * (rows + flying * tokens * _rows_kept(n, model, placed.ep, stage)) / GIB
    )
    terms = {name: value / GIB for name, value in terms.items()}
    terms |= _of_device(recipe, placed, stage, cluster, sum(terms.values()), uneven)
    return StageMemory(
        index=stage.index,
        layers=stage.ranges,
        in_flight=flying,
        parameters=state.parameters,
        terms=terms,
        activations_by={name: value / GIB for name, value in share.items()},
        moment="backward" if in_backward else "optimizer",
        host=host / GIB,
    )


def _kinds(n: Numbers, stage: Stage) -> tuple[tuple[str, bool], ...]:
    return tuple(n.kind(layer) for layer in stage.layers)


def _persistent(recipe: Recipe, state: State, assumed: Assumptions) -> tuple[dict[str, float], float]:
    """Bytes that stay from step to step: on the device, and in host memory."""
    w = kept.width(recipe.model.dtype)
    masters = 4.0 * (state.own_muon + state.own_adamw)
    if w == 4 and not recipe.parallel.offload:
        masters = 0.0  # of an fp32 parameter they are views
    moments = 4.0 * state.own_muon + 8.0 * state.own_adamw
    off = recipe.parallel.offload or assumed.swapped
    held = {
        "weights": float(w * state.parameters),
        "gradients": 4.0 * state.gradients,
        "masters": 0.0 if off else masters,
        "moments": 0.0 if off else moments,
    }
    return held, masters + moments if off else 0.0


@cache
def _activations(
    n: Numbers,
    model: ModelSection,
    row_tokens: int,
    ep: int,
    cp: int,
    kinds: tuple[tuple[str, bool], ...],
    last: bool,
    mtp: bool,
) -> dict[str, float]:
    """Bytes a token of one micro-batch in all layers of a stage, by what they are of."""
    found = {"positions": kept.positions(n)}
    for kind, hashed in kinds:
        for name, value in kept.block(n, kind, hashed, model, row_tokens, ep, cp).items():
            found[name] = found.get(name, 0.0) + value
    if last:
        found |= kept.ends(n, model, mtp, row_tokens, ep, cp)
    return found


def _rows_kept(n: Numbers, model: ModelSection, ep: int, stage: Stage) -> float:
    """Bytes a token of what grows with the rows that a rank's experts get."""
    if model.checkpointing == "full" or ep == 1:
        return 0.0
    a_row = (n.hidden_size + 2 * n.moe_intermediate_size) * kept.width(model.dtype)
    return len(stage.layers) * n.num_experts_per_tok * a_row


def _temporary(recipe: Recipe, placed: Placed, stage: Stage, rows: float, on_cpu: bool) -> float:
    """The largest working set of a backward pass through this stage, beside the all-to-all's ``rows``."""
    n, model, tokens = placed.numbers, recipe.model, placed.micro_tokens
    kinds = {kind for kind, _ in _kinds(n, stage)}
    T, ep, cp = placed.row_tokens, placed.ep, placed.cp
    found = [kept.backward(n, kind, model, T, tokens, ep, cp, on_cpu) for kind in kinds]
    if stage.last and recipe.objective.kind != "reward":
        found.append(
            kept.head(n, tokens, kept.width(model.dtype), placed.mtp, on_cpu) - rows
        )  # no rows travel while the head works
    return max(found)


def _step_temporary(recipe: Recipe, state: State) -> float:
    """Of the optimizer's step: one buffer of gathered weights, or a stack of matrices in Newton-Schulz."""
    gathered = 1.125 * kept.width(recipe.model.dtype) * state.bucket
    if recipe.optim.kind != "muon" or recipe.parallel.offload:
        return gathered
    # fp32: the stack and its normed copy; then the stack, two in bf16, two squares; at the end the result in fp32.
    return max(gathered, state.stack * 3.0 + 2.0 * 2 * (state.gram / 2))


def _of_device(
    recipe: Recipe, placed: Placed, stage: Stage, cluster: Cluster | None, tensors: float, uneven: float
) -> dict[str, float]:
    """Terms that no tensor shows, GiB."""
    if cluster is None:
        return {"communicators": 0.0, "runtime": 0.0, "slack": uneven}
    return {
        "communicators": communicators(placed, stage) * _communicator_mib(recipe, placed, cluster) / 1024,
        "runtime": cluster.runtime_gib.value,
        "slack": cluster.allocator_share.value * tensors + uneven,
    }


def _communicator_mib(recipe: Recipe, placed: Placed, cluster: Cluster) -> float:
    """Of an NPU what the launch scripts, or the recipe's own settings, make HCCL take."""
    if cluster.communicator_mib is not None:
        return cluster.communicator_mib.value
    own = recipe.cluster.options.get("environment") or {}
    own = str(own.get("HCCL_BUFFSIZE", "")) if isinstance(own, dict) else ""
    n = placed.numbers
    return 2.0 * (
        int(own) if own.isdigit() else hccl_buffer(n.hidden_size, placed.micro_tokens, recipe.model.dtype)
    )


def hccl_buffer(hidden_size: int, micro_tokens: int, dtype: str) -> int:
    """``HCCL_BUFFSIZE`` in MB: one micro-batch's hidden states. A communicator has it twice, in the device's memory."""
    return max(LEAST_BUFFER, ceil(micro_tokens * hidden_size * kept.width(dtype) / 2**20))


def communicators(placed: Placed, stage: Stage) -> float:
    """Groups of more than one rank that a rank of this stage sends through: the world, data, shared rows, experts,
    their replicas, the pipeline and its two neighbours, the embedding of both ends, the limited groups of whole
    matrices."""
    found = [
        placed.ranks > 1,
        placed.data_ranks > 1,
        placed.cp > 1,
        placed.ep > 1,
        placed.moe_dp > 1 and placed.ep > 1,
        placed.pp > 1,
    ]
    found.append(placed.mtp and placed.pp > 1 and (stage.first or stage.last))
    found.append(placed.data_ranks > 1)
    # Neighbours in the pipeline have communicators of a tenth of the size (P2P_HCCL_BUFFSIZE).
    return sum(found) + (0 if placed.pp == 1 else 0.2)
