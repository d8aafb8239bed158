"""Seconds of messages on the plane that they cross.

The mesh is ``(moe_dp, pp, ep)`` from the outermost axis on, and ranks are taken to stand in order: an ep group is
``ep`` neighbours, a neighbouring stage ``ep`` ranks away, replicas of experts ``pp·ep``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lab_utils.planner.cluster import Case, Cluster, Plane


@dataclass(frozen=True)
class Group:
    """``size`` ranks in runs of ``run`` neighbours, ``stride`` from one run to the next, aligned to their span in a job
    of ``world`` ranks."""

    size: int
    stride: int = 1
    run: int = 1
    world: int = 0

    @property
    def span(self) -> int:
        """Ranks from the first to the last."""
        blocks = math.ceil(self.size / self.run)
        return (blocks - 1) * self.stride + self.run

    def inside(self, plane: Plane) -> int:
        """How many of its ranks are together within one domain of the plane."""
        if plane.devices is None or max(self.world, self.span) <= plane.devices:
            return self.size
        if self.span <= plane.devices:
            cut = plane.devices % self.span  # where a boundary falls into one of these groups
            return max(cut, self.span - cut) * self.size // self.span if cut else self.size
        blocks = max(1, (plane.devices - self.run) // self.stride + 1) if plane.devices >= self.run else 0
        return min(self.size, blocks * self.run) if blocks else min(self.size, plane.devices)


def plane_of(cluster: Cluster, group: Group) -> Plane:
    """The innermost plane that reaches all of a group."""
    return next(plane for plane in cluster.planes if group.inside(plane) == group.size)


def all_to_all(cluster: Cluster, group: Group, sent: float, case: Case) -> float:
    """One all-to-all in which each rank sends so many bytes in all to the others."""
    if group.size == 1 or not sent:
        return 0.0
    plane = plane_of(cluster, group)
    if plane.all_to_all_gb_s is not None:
        share = cluster.efficiency.network.of(case) / cluster.efficiency.network.value
        return sent / (plane.all_to_all_gb_s.at(group.size) * 1e9 * share) + plane.latency_us.value * 1e-6
    near, found = 1, 0.0
    for each in cluster.planes:  # what leaves a domain goes over the next plane, at the same time
        inside = group.inside(each)
        out = sent * (group.size - near) / (group.size - 1)
        found = max(found, out / _rate(cluster, each, case))
        near = inside
        if inside == group.size:
            return found + each.latency_us.value * 1e-6
    return found


def ring(cluster: Cluster, group: Group, total: float, case: Case, *, both_ways: bool = False) -> float:
    """A reduce-scatter or all-gather of so many bytes in all; ``both_ways``: an all-reduce.

    Hierarchical: first within a domain, then what is left of a rank's share between domains.
    """
    if group.size == 1 or not total:
        return 0.0
    seconds, near, left = 0.0, 1, total
    for plane in cluster.planes:
        inside = group.inside(plane)
        parts = inside / near
        if parts > 1:
            seconds += left * (parts - 1) / parts / _rate(cluster, plane, case)
            seconds += math.ceil(math.log2(parts)) * plane.latency_us.value * 1e-6
            left /= parts
        near = max(near, inside)
        if inside == group.size:
            break
    return seconds * (2 if both_ways else 1)


def message(cluster: Cluster, group: Group, sent: float, case: Case) -> float:
    """One message between neighbours of a group, over the plane that all of the group needs."""
    plane = plane_of(cluster, group)
    return sent / _rate(cluster, plane, case) + plane.latency_us.value * 1e-6


def _rate(cluster: Cluster, plane: Plane, case: Case) -> float:
    return plane.gb_s.value * 1e9 * cluster.efficiency.network.of(case)
