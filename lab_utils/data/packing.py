"""First-fit packing: each document goes, whole, into the first row that still has room for it."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of documents by row.

    A tree of maxima over the free tokens of the rows finds the first row with room in log₂(rows) steps.

    Args:
        lengths: tokens of each document, in the order in which they are placed.
        row_tokens: tokens of a row.

    Raises:
        ValueError: a document is empty or longer than a row.
    """
    if not len(lengths):
        return []
    if min(lengths) < 1 or max(lengths) > row_tokens:
        raise ValueError(f"document lengths must be 1 … {row_tokens}, got {min(lengths)} … {max(lengths)}")
    size = 1
    free = [0, row_tokens]  # free[1] is the root; the leaves are rows, the last ones of them not yet opened
    rows: list[list[int]] = [[]]
    for document, length in enumerate(lengths):
        if free[1] < length:  # no row has room: twice as many leaves, the old tree on the left
            free = _doubled(free, size, row_tokens)
            size *= 2
        node = 1
        while node < size:
            node *= 2
            if free[node] < length:
                node += 1
        row = node - size
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        free[node] -= length
        node //= 2
        while node:
            left, right = free[2 * node], free[2 * node + 1]
            free[node] = left if left > right else right
            node //= 2
    return rows


def _doubled(free: list[int], size: int, row_tokens: int) -> list[int]:
    """The tree with as many untouched rows again to the right."""
    grown = [0] * (2 * size) + free[size:] + [row_tokens] * size
    for node in range(2 * size - 1, 0, -1):
        grown[node] = max(grown[2 * node], grown[2 * node + 1])
    return grown


def padding_fraction(rows: Sequence[Sequence[int]], lengths: Sequence[int], row_tokens: int) -> float:
    """Share of the rows' tokens that is padding."""
    if not rows:
        return 0.0
    used = sum(int(lengths[document]) for row in rows for document in row)
    return 1.0 - used / (len(rows) * row_tokens)
