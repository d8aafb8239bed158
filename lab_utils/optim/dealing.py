"""Whole matrices dealt out to ranks, one owner each, the same on every rank. Without torch: a planner asks, too."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

UNEVEN = 1.1  # the largest share over the mean


def assign(sizes: Sequence[int], ranks: int, loads: Sequence[int] | None = None) -> list[int]:
    """The rank that owns each matrix: largest first, each to the least laden rank (TR §3.4.1 asks for a knapsack).

    The heaviest rank ends at most one matrix above the lightest. Ties go to the first.

    Args:
        sizes: elements of each matrix.
        ranks: how many share them.
        loads: elements that each rank holds already.
    """
    heap = [(load, rank) for rank, load in enumerate(loads or [0] * ranks)]
    heapq.heapify(heap)
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, owners[index] = heap[0]
        heapq.heapreplace(heap, (load + sizes[index], owners[index]))
    return owners


def even_shards(sizes: Sequence[int], ranks: int) -> int:
    """Over how many of the ranks whole matrices are dealt out: the largest divisor that leaves no rank more than a
    tenth above its share. A large matrix on one of many ranks would make all of them hold room for it.
    """
    total, largest = sum(sizes), max(sizes, default=0)
    for shards in (d for d in range(ranks, 1, -1) if ranks % d == 0):
        if largest > UNEVEN * total / shards:
            continue  # one matrix alone is above it
        loads = [0] * shards
        for owner, size in zip(assign(sizes, shards), sizes, strict=True):
            loads[owner] += size
        if max(loads) <= UNEVEN * total / shards:
            return shards
    return 1
