"""Seconds of an optimizer step, term by term, on a cluster: the work of ``work.py`` at the cluster's efficiencies.

    step = step_time(recipe, cluster, ranks=2048)
    step.seconds, step.terms, step.binding

The slowest stage sets the pace of a pipeline: its own terms, times the micro-batches, and the bubble around. Terms:

    products attention indexer hyper_connections memory    forward and backward of the slowest stage
    recompute                                              what checkpointing makes again
    accumulate                                             gradients added to fp32 buffers, once a micro-batch
    all_to_all host_waits                                  experts, as far as nothing hides them
    context                                                of ranks that share rows
    messages bubble                                        of the pipeline
    gradient_sum norm optimizer gather                     once a step
    data checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lab_utils.models.deepseek_v4.counting import WINDOW_ONLY, training_flops
from lab_utils.planner import kept, work
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.network import Group, all_to_all, message, ring
from lab_utils.planner.placed import Placed, Stage, place
from lab_utils.planner.rates import Rates, other_end
from lab_utils.planner.update import alike_key, data_group, once, state_in
from lab_utils.recipe import Recipe

if TYPE_CHECKING:
    from lab_utils.planner.cluster import Cluster

GROUPS = {
    "products": "matrix products",
    "attention": "attention",
    "indexer": "lightning indexer",
    "hyper_connections": "hyper-connections",
    "memory": "norms, SwiGLU, rows of experts",
    "recompute": "recomputation",
    "accumulate": "gradients into fp32 buffers",
    "all_to_all": "all-to-all",
    "host_waits": "waits for the host, calls",
    "context": "exchange within rows",
    "messages": "pipeline messages",
    "bubble": "pipeline bubble",
    "gradient_sum": "gradient sum",
    "norm": "gradient norm",
    "optimizer": "optimizer",
    "gather": "gather of new weights",
    "data": "data",
    "checkpoint": "checkpoint stall",
}
FUSED_BACKWARD = (
    "products",
    "attention",
    "indexer",
    work.HYPER,
    "memory",
    "all_to_all",
    "host_waits",
    "context",
)


@dataclass(frozen=True)
class StepTime:
    """One step on one layout.

    Attributes:
        terms: seconds by the names of ``GROUPS``; they add up to ``seconds``.
        slowest: the stage that sets the pace; ``stages``: seconds of a micro-batch in each.
        flops_per_token: of the model proper (``counting.training_flops``: without multi-token prediction, the indexer
            forward only), the numerator of ``mfu``; ``trained_flops_per_token``: of all that is trained.
        peak_tflops: of a device in bf16, the denominator.
    """

    terms: dict[str, float]
    tokens: int
    ranks: int
    flops_per_token: float
    trained_flops_per_token: float
    peak_tflops: float
    slowest: int = 0
    stages: tuple[float, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        return self.flops_per_token * self.tokens_per_s / (self.ranks * self.peak_tflops * 1e12)

    @property
    def mfu_trained(self) -> float:
        return self.mfu * self.trained_flops_per_token / self.flops_per_token

    @property
    def binding(self) -> str:
        """The largest term that isn't matrix products, in words."""
        name = max((each for each in self.terms if each != "products"), key=lambda each: self.terms[each])
        share = 100 * self.terms[name] / self.seconds
        return f"{GROUPS[name]}, {share:.0f} % of the step"


def step_time(
    recipe: Recipe, cluster: Cluster, ranks: int | None = None, assumed: Assumptions | None = None
) -> StepTime:
    """The step of ``recipe`` on so many ranks of a cluster.

    Raises:
        LayoutError: the engine would refuse the layout.
    """
    assumed = assumed or Assumptions()
    placed = place(recipe, ranks)
    return of_placed(recipe, placed, Rates(cluster, assumed))


def of_placed(recipe: Recipe, placed: Placed, rates: Rates) -> StepTime:
    """The same for a layout that has been made."""
    known: dict[tuple, tuple[dict[str, float], dict[str, float]]] = {}
    found = []
    for stage in placed.stages:  # stages that hold the same take as long
        alike = alike_key(placed, stage)
        if alike not in known:
            known[alike] = _micro_batch(recipe, placed, stage, rates)
        found.append(known[alike])
    totals = [sum(terms.values()) for terms, _ in found]
    slowest = max(range(len(totals)), key=totals.__getitem__)
    terms, parts = found[slowest]
    terms = {name: placed.passes * value for name, value in terms.items()}
    # Filling and draining: each stage once, but the one that is counted in full; virtual stages cut it up.
    terms["bubble"] = (sum(totals) - totals[slowest]) / placed.virtual_stages
    terms |= once(recipe, placed, rates)
    n, warmup = placed.numbers, recipe.model.indexer_phase == "warmup"
    trained = training_flops(
        n,  # type: ignore[arg-type]
        [placed.row_tokens],
        indexer_trained=recipe.model.indexer_loss > 0,
        mtp=placed.mtp and not warmup,
        indexer_warmup=warmup,
    )
    return StepTime(
        terms={name: terms.get(name, 0.0) for name in GROUPS},
        tokens=placed.tokens,
        ranks=placed.ranks,
        flops_per_token=flops_per_token(recipe, placed.row_tokens),
        trained_flops_per_token=trained,
        peak_tflops=rates.cluster.device.tflops.value,
        slowest=slowest,
        stages=tuple(totals),
        parts={name: placed.passes * value for name, value in parts.items()},
    )


def flops_per_token(recipe: Recipe, length: int) -> float:
    """Of the model proper, for documents of this length."""
    from lab_utils.planner.numbers import numbers

    return training_flops(numbers(recipe.model.source), [length])  # type: ignore[arg-type]


# -- a micro-batch in one stage ---------------------------------------------------------------------------------------


def _micro_batch(
    recipe: Recipe, placed: Placed, stage: Stage, rates: Rates
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by term of one micro-batch, forward and backward; and seconds of products by part."""
    n, model, N, assumed = placed.numbers, recipe.model, placed.micro_tokens, rates.assumed
    w = kept.width(model.dtype)
    options = {
        "indexer_loss": model.indexer_loss > 0,
        "warmup": model.indexer_phase == "warmup",
        "fused": rates.fused,
        "cp": placed.cp,
    }
    terms = dict.fromkeys(GROUPS, 0.0)
    parts: dict[str, float] = {}

    def add(kind: str, times: int) -> None:
        own = work.layer(n, kind, placed.row_tokens, N, placed.ep, w, **options)
        _add(
            terms,
            parts,
            seconds(own, rates, placed, "none" if options["warmup"] else model.checkpointing),
            times,
        )

    kinds = [n.kind(layer)[0] for layer in stage.layers]
    for kind in dict.fromkeys(kinds):
        add(kind, kinds.count(kind))
    if stage.last and recipe.objective.kind != "reward":
        mtp = n.num_nextn_predict_layers if placed.mtp and not options["warmup"] else 0
        behind = work.ends(
            n,
            N,
            w,
            loss_share=assumed.loss_share,
            times=1 + mtp,
            warmup=options["warmup"],
            chunk=kept.CPU_CHUNK if rates.on_cpu else kept.CHUNK,
        )
        _add(terms, parts, seconds(behind, rates, placed, "none"), 1)
        if mtp:
            add(WINDOW_ONLY, mtp)
            _add(terms, parts, seconds(work.mtp_entry(n, N), rates, placed, "none"), mtp)
    state = state_in(recipe, placed, stage)
    # The gradient is written in the working precision, read, and added to its fp32 buffer.
    terms["accumulate"] = rates.moving(state.parameters * (2 * w + 8.0), 4.0 * state.parameters)
    if placed.pp > 1 and not assumed.hidden_messages:
        streams = float(n.hc_mult * n.hidden_size * w * N)
        pipeline = Group(placed.pp, placed.ep, 1, placed.ranks)
        sides = 1 if (stage.first or stage.last) and placed.virtual_stages == 1 else 2
        terms["messages"] = (
            sides * placed.virtual_stages * message(rates.cluster, pipeline, streams, assumed.case)
        )
    return terms, parts


def _add(
    terms: dict[str, float],
    parts: dict[str, float],
    found: tuple[dict[str, float], dict[str, float]],
    times: int,
) -> None:
    for into, what in zip((terms, parts), found, strict=True):
        for name, value in what.items():
            into[name] = into.get(name, 0.0) + times * value


def seconds(
    own: work.Work, rates: Rates, placed: Placed, again: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Forward and backward seconds of a layer by term, what is made again under ``recompute``; products by part."""
    assumed, uneven = rates.assumed, rates.assumed.imbalance if placed.ep > 1 else 1.0
    forward = dict.fromkeys(FUSED_BACKWARD, 0.0)
    backward, parts = dict(forward), {}
    attention_again = 0.0
    shared = 0.0
    for one in own.products:
        took = rates.product(one) * (uneven if one.part == "experts" else 1.0)
        name = "indexer" if one.part == "indexer" else "products"
        forward[name] += took
        backward[name] += one.backward * took
        parts[one.part] = parts.get(one.part, 0.0) + (1 + one.backward) * took
        attention_again += took if one.part in ("attention", "indexer") else 0.0
        shared += took if one.part == "shared" else 0.0
    forward["attention"] = own.attention / rates.attention
    backward["attention"] = own.attention_backward / rates.attention
    forward["indexer"] += own.scores / rates.attention
    for into, moved in ((forward, own.moved), (backward, own.moved_backward)):
        into[work.HYPER] = rates.moving(moved.get(work.HYPER, 0.0), own.tensors.get(work.HYPER, 0.0))
        into["memory"] = rates.moving(moved.get("other", 0.0), own.tensors.get("other", 0.0))
    if own.sent:
        group = Group(placed.ep, placed.ep, placed.ep, placed.ranks)
        one_way = all_to_all(rates.cluster, group, own.sent * uneven, assumed.case)
        beside = min(one_way, shared) if own.shared_beside and not rates.on_cpu else 0.0
        travel = (own.exchanges * one_way - beside) * (1 - assumed.hidden_exchange)
        forward["all_to_all"] = backward["all_to_all"] = travel
        forward["host_waits"] = rates.cluster.host_wait_us.of(other_end(assumed.case)) * 1e-6
    if own.attention and (calls := rates.cluster.layer_calls_us) is not None:
        forward["host_waits"] += calls.value * 1e-6 / 3
        backward["host_waits"] += calls.value * 1e-6 * 2 / 3
    if own.before:
        forward["context"], backward["context"] = within_rows(own, placed, rates)
    terms = {name: forward[name] + backward[name] for name in forward}
    if again == "full":
        terms["recompute"] = sum(forward.values())
    elif again == "attention":
        heads = 0.5 * forward["memory"]
        terms["recompute"] = attention_again + forward["attention"] + own.scores / rates.attention + heads
    elif again == "mhc":
        terms["recompute"] = 2.0 * forward[work.HYPER]  # the way in twice, the way out to between
    return terms, parts


def within_rows(own: work.Work, placed: Placed, rates: Rates) -> tuple[float, float]:
    """Seconds of what the ranks that share a row tell one another, forward and backward."""
    sharers, cluster, case = data_group(placed, placed.cp), rates.cluster, rates.assumed.case
    ahead = message(cluster, sharers, own.before, case)
    forward, backward = (ring(cluster, sharers, each, case) for each in (own.entries, own.entries_backward))
    return ahead + forward, ahead + backward
