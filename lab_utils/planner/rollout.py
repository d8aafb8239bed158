"""Seconds of a round of samples drawn from the model itself: decoding, bound by weights and by which experts wake.

As ``models/deepseek_v4/decoding.py`` runs it: every rank answers its own prompts, ``rollout.slots`` at a time; the
stages of a pipeline work one after the other; rows travel to their experts over the ep group. Reading the prompts is
left out, and every answer is taken to be of full length: both ends of the error are named in ``docs/planner.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lab_utils.errors import LayoutError
from lab_utils.models.deepseek_v4.counting import CSA, HCA, active_parameters, parameters_by_component
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import Cluster
from lab_utils.planner.kept import width
from lab_utils.planner.network import Group, all_to_all
from lab_utils.planner.numbers import Numbers
from lab_utils.planner.placed import Placed, place
from lab_utils.planner.rates import Rates
from lab_utils.recipe import Recipe


@dataclass(frozen=True)
class RolloutTime:
    """A round of samples.

    Attributes:
        terms: seconds of one decoding step by what takes them; ``decode_steps`` of them make the round.
        coverage: share of a rank's experts that a step reads.
    """

    terms: dict[str, float]
    decode_steps: int
    answers: int
    tokens: int
    coverage: float

    @property
    def step_s(self) -> float:
        return sum(self.terms.values())

    @property
    def seconds(self) -> float:
        return self.decode_steps * self.step_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def rollout_time(
    recipe: Recipe,
    cluster: Cluster,
    ranks: int | None = None,
    assumed: Assumptions | None = None,
    *,
    prompt_tokens: int = 512,
) -> RolloutTime:
    """One round of ``recipe.rollout`` on the layout of the recipe.

    Args:
        prompt_tokens: of a prompt, for the size of the cache.

    Raises:
        LayoutError: the recipe takes no samples, or takes them from a server, whose speed isn't known here.
    """
    section, placed = recipe.rollout, place(recipe, ranks)
    if section is None or section.source != "in_process":
        raise LayoutError(
            "rollout: only samples drawn in process can be predicted; a server's speed isn't known here."
        )
    n, rates = placed.numbers, Rates(cluster, assumed or Assumptions())
    answers = section.prompts * section.group_size
    each = math.ceil(answers / placed.dp)
    slots = min(section.slots, each)
    length = prompt_tokens + section.max_new_tokens // 2
    terms, coverage = _step(n, placed, rates, slots, length, width(recipe.model.dtype))
    rounds = math.ceil(each / slots)
    return RolloutTime(
        terms=terms,
        decode_steps=rounds * section.max_new_tokens,
        answers=answers,
        tokens=answers * section.max_new_tokens,
        coverage=coverage,
    )


def experts_read(n: Numbers, tokens: int) -> float:
    """Share of the experts that at least one of so many tokens goes to, choices taken to be even."""
    return 1.0 - (1.0 - n.num_experts_per_tok / n.n_routed_experts) ** tokens


def cache_bytes(n: Numbers, length: int, w: int) -> float:
    """Read for one token of a text so long, over all layers: its window, the entries attended, the indexer's keys."""
    K, total = n.head_dim, 0.0
    for kind in n.layer_types:
        total += min(length, n.sliding_window) * K
        if kind == HCA:
            total += length // n.compress_hca * K
        elif kind == CSA:
            entries = length // n.compress_csa
            total += min(entries, n.index_topk) * K + (
                entries * n.index_head_dim if entries > n.index_topk else 0
            )
    return total * w


def _step(
    n: Numbers, placed: Placed, rates: Rates, slots: int, length: int, w: int
) -> tuple[dict[str, float], float]:
    """Seconds of one token for each of a rank's slots, through all stages in turn."""
    parts = parameters_by_component(n)  # type: ignore[arg-type]
    coverage = experts_read(n, slots * placed.ep)
    dense = sum(parts.values()) - parts["routed experts"] - parts["embedding"]
    weights = w * (dense + coverage * parts["routed experts"] / placed.ep)
    flops = 2.0 * slots * active_parameters(n)  # type: ignore[arg-type]
    products = flops / (rates.cluster.device.tflops.value * 1e12 * 0.5)
    read = weights / rates.bandwidth
    group = Group(placed.ep, placed.ep, placed.ep, placed.ranks)
    sent = float(slots * n.num_experts_per_tok * n.hidden_size * w) * (placed.ep - 1) / placed.ep
    travel = 2 * n.num_hidden_layers * all_to_all(rates.cluster, group, sent, rates.assumed.case)
    waits = n.num_hidden_layers * rates.cluster.host_wait_us.value * 1e-6
    hop = 2.0 * placed.pp * rates.cluster.planes[0].latency_us.value * 1e-6 if placed.pp > 1 else 0.0
    return {
        "weights": max(read, products),
        "cache": slots * cache_bytes(n, length, w) / rates.bandwidth,
        "all_to_all": travel,
        "host_waits": waits,
        "stages": hop,
    }, coverage
