"""Seconds of what comes once a step: sums of gradients, norm, update, gather of new weights, data, checkpoint.

As ``engine/zero.py`` does them: fp32 buffers are summed (scattered where every rank owns a part), Muon's matrices are
orthogonalised where they lie whole, and the new weights are gathered in the working precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab_utils.planner import kept
from lab_utils.planner.network import Group, ring
from lab_utils.planner.placed import Placed, Stage
from lab_utils.planner.state import State, state_of
from lab_utils.recipe import Recipe

if TYPE_CHECKING:
    from lab_utils.planner.rates import Rates


def alike_key(placed: Placed, stage: Stage) -> tuple:
    """Equal for stages that hold the same kinds of layers."""
    return tuple(sorted(placed.numbers.kind(layer) for layer in stage.layers)), stage.first, stage.last


def state_in(recipe: Recipe, placed: Placed, stage: Stage) -> State:
    scored = recipe.objective.kind == "reward"
    return state_of(
        placed, stage.index, muon=recipe.optim.kind == "muon", zero=recipe.parallel.zero, scored=scored
    )


def once(recipe: Recipe, placed: Placed, rates: Rates) -> dict[str, float]:
    """Sums, norm, update, gather, data and checkpoint: of the stage that takes longest over all of them."""
    alike = {alike_key(placed, stage): stage for stage in placed.stages}
    found = [_update(recipe, placed, stage, rates) for stage in alike.values()]
    terms = max(found, key=lambda each: sum(each.values()))
    terms["data"] = placed.passes * placed.micro_tokens / rates.cluster.data_tokens_s.value
    every = recipe.schedule.save_every
    if every:
        terms["checkpoint"] = stall(recipe, placed, rates) / every
    return terms


def data_group(placed: Placed, ranks: int) -> Group:
    """The ranks over which something is summed or cut: all data ranks of a stage, replicas of experts, or fewer."""
    block = placed.pp * placed.ep
    if ranks <= placed.ep:
        return Group(ranks, ranks, ranks, placed.ranks)
    return Group(ranks, block, placed.ep, placed.ranks)


def _update(recipe: Recipe, placed: Placed, stage: Stage, rates: Rates) -> dict[str, float]:
    cluster, case, w = rates.cluster, rates.assumed.case, kept.width(recipe.model.dtype)
    state = state_in(recipe, placed, stage)
    sums = gather = 0.0
    for elements, ranks, shards, expert in state.reduced:
        if ranks > 1:
            over = (
                Group(ranks, placed.pp * placed.ep, 1, placed.ranks) if expert else data_group(placed, ranks)
            )
            whole = shards != ranks
            sums += ring(cluster, over, 4.0 * elements, case, both_ways=whole)
        if shards > 1:
            cut = (
                Group(shards, placed.pp * placed.ep, 1, placed.ranks)
                if expert
                else data_group(placed, shards)
            )
            gather += ring(cluster, cut, float(w * elements), case)
    own = state.own_muon + state.own_adamw
    moments = (
        72.0 * state.own_muon + 28.0 * state.own_adamw
    )  # bytes of a pass over each; Muon stacks and normalises
    if recipe.parallel.offload:
        host = cluster.host
        update = own * 8.0 / (host.gb_s.value * 1e9) + state.muon_flops / (host.tflops.value * 1e12)
        update += moments / (
            0.05 * cluster.device.bandwidth_tb_s.value * 1e12
        )  # a share of the host's memory
    else:
        # Swapped: gradients stay, masters and moments come and go.
        swap = own * 16.0 / (cluster.host.gb_s.value * 1e9) if rates.assumed.swapped else 0.0
        ns = cluster.device.tflops.value * 1e12 * cluster.efficiency.products.at(4096) * 0.8
        update = state.muon_flops / ns + rates.moving(moments, 4.0 * own) + swap
    copies = rates.moving(state.parameters * 3.0 * w + 6.0 * own, w * state.parameters)
    small = 4 * cluster.planes[-1].latency_us.value * 1e-6 * placed.ranks.bit_length()
    return {
        "gradient_sum": sums,
        "norm": rates.moving(4.0 * own, 4.0 * own) + small,
        # The buffers are emptied as well.
        "optimizer": update + rates.moving(4.0 * state.gradients, 4.0 * state.gradients),
        "gather": gather + copies,
    }


def stall(recipe: Recipe, placed: Placed, rates: Rates) -> float:
    """Seconds that a checkpoint stops training: the copy to host memory, or with ``async_save`` off the writing too."""
    cluster, longest = rates.cluster, 0.0
    for stage in placed.stages:
        state = state_in(recipe, placed, stage)
        states = 8.0 * state.own_muon + 12.0 * state.own_adamw
        weights = kept.width(recipe.model.dtype) * (
            state.experts / max(1, placed.moe_dp) + state.dense / placed.data_ranks
        )
        seconds_ = (states + weights) / (cluster.host.gb_s.value * 1e9)
        if not recipe.schedule.async_save:
            node = (states + weights) * min(placed.ranks, cluster.devices_per_node)
            seconds_ += node / (cluster.host.storage_gb_s.value * 1e9)
        longest = max(longest, seconds_)
    return longest
