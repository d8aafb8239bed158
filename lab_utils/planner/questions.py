"""Questions that a plan answers: how long and how much energy a data set takes, how many chips a deadline needs, the
longest context that fits, and what crosses the boundary of a SuperPoD."""

from __future__ import annotations

from dataclasses import dataclass

from lab_utils.errors import LabError, LayoutError
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import Cluster, Plane, find
from lab_utils.planner.network import Group
from lab_utils.planner.numbers import numbers
from lab_utils.planner.placed import Placed
from lab_utils.planner.plan import Plan, plan
from lab_utils.planner.search import Candidate
from lab_utils.planner.update import data_group
from lab_utils.recipe import Recipe


@dataclass(frozen=True)
class Cost:
    """Of training on so many tokens; predicted."""

    tokens: float
    steps: int
    chips: int
    hours: float
    chip_hours: float
    megawatt_hours: float

    def sentence(self) -> str:
        return (
            f"{self.tokens:,.0f} tokens are {self.steps:,} steps: {self.hours:,.1f} hours on {self.chips:,} chips, "
            f"{self.chip_hours:,.0f} chip-hours, {self.megawatt_hours:,.1f} MWh."
        )


def cost(made: Plan, tokens: float, candidate: Candidate | None = None) -> Cost:
    """Time and energy of so many tokens, read once or in epochs, on a plan's layout.

    Raises:
        LayoutError: nothing fits.
    """
    chosen = candidate or made.best
    if chosen is None:
        raise LayoutError(" ".join(made.knobs()))
    steps = -(-int(tokens) // chosen.time.tokens)
    hours = steps * chosen.time.seconds / 3600
    watts = made.cluster.watts_per_chip.value * made.chips
    return Cost(tokens, steps, made.chips, hours, hours * made.chips, hours * watts / 1e6)


def chips_for(
    recipe: Recipe,
    cluster: Cluster | str,
    tokens: float,
    days: float,
    *,
    assumed: Assumptions | None = None,
    most: int = 8192,
) -> Plan | None:
    """The plan on the fewest chips, in whole nodes and powers of two or three halves of one, that ends in time.

    None: not even ``most`` chips do; a batch bounds how many can share it.
    """
    where = find(cluster)
    sizes, chips = [], where.chips_per_node
    while chips <= most:
        sizes += [chips] + ([chips * 3 // 2] if chips * 3 // 2 <= most and chips * 3 % 2 == 0 else [])
        chips *= 2
    for size in sizes:
        if size > where.chips_per_node and size % where.chips_per_node:
            continue
        made = plan(recipe, where, size, assumed=assumed)
        if made.fits and cost(made, tokens).hours <= 24 * days:
            return made
    return None


def largest_context(
    recipe: Recipe, cluster: Cluster | str, chips: int, *, assumed: Assumptions | None = None
) -> tuple[int, Plan | None]:
    """The longest row, doubled from the recipe's own, for which a layout fits at the recipe's batch; 0 if none does.

    Longer rows are cut over more ranks (``parallel.cp``), as the search finds it best.
    """
    where, longest, kept = find(cluster), 0, None
    tokens, most = recipe.data.row_tokens, numbers(recipe.model.source).max_position_embeddings
    while tokens <= most:
        longer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"row_tokens": tokens})})
        try:
            made = plan(longer, where, chips, assumed=assumed)
        except LabError:
            break
        if not made.fits:
            break
        longest, kept = tokens, made
        tokens *= 2
    return longest, kept


def crossings(placed: Placed, cluster: Cluster) -> list[str]:
    """What of a layout leaves the innermost plane of a cluster, and what that means; [] if nothing does.

    Ranks are taken to fill one domain after the other.
    """
    plane = cluster.planes[0]
    if plane.devices is None or placed.ranks <= plane.devices:
        return []
    outer = cluster.planes[1].name
    found = []
    cut = straddling(placed, plane)
    if cut:
        found.append(
            f"{cut} of {placed.ranks // placed.ep} ep groups straddle a boundary of {plane.devices} devices: their "
            f"all-to-all goes over {outer}, and all stages wait for them. Use an ep that divides {plane.devices}."
        )
    block = placed.pp * placed.ep
    if placed.pp > 1 and (block > plane.devices or plane.devices % block):
        found.append(
            f"pipelines of {placed.pp} stages take {block} devices and {plane.devices} are together: some stages hand "
            f"their streams on over {outer}."
        )
    if placed.data_ranks > 1:
        inside = data_group(placed, placed.data_ranks).inside(plane)
        if inside < placed.data_ranks:
            found.append(
                f"gradients are summed over {placed.data_ranks} ranks, {inside} of them in a domain: the rest of the "
                f"sum goes over {outer}, once a step."
            )
    if placed.moe_dp > 1:
        replicas = Group(placed.moe_dp, block, 1, placed.ranks)
        if replicas.inside(plane) < placed.moe_dp:
            found.append(
                f"the {placed.moe_dp} replicas of an expert stand in several domains: so does their sum."
            )
    return found


def straddling(placed: Placed, plane: Plane) -> int:
    """Ep groups that a boundary of the plane cuts."""
    if plane.devices is None or placed.ep == 1:
        return 0
    found = 0
    for start in range(0, placed.ranks, placed.ep):
        found += start // plane.devices != (start + placed.ep - 1) // plane.devices
    return found
