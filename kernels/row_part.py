"""A run of tokens of packed rows whose other tokens are on other ranks (context parallelism).

Part r of R has tokens ``r·T`` to ``(r+1)·T`` of every row. Its queries see keys of the ``before`` tokens that precede
them, and compressed entries of the whole row. A part pools the entries whose window closes among its own tokens; those
of all parts are put together in the order of the row.

Legend: B rows, T tokens of a part, X = before + T key tokens, C compressed entries of a row, c entries that a part
pools at most, m compression rate, R parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.geometry import Entries, Geometry


class PartEntries:
    """The row's compressed entries as a part's queries see them."""

    def __init__(self, whole: Entries, start: int, stop: int):
        self.rate, self.count, self.single = whole.rate, whole.count, False
        self.first_BT, self.visible_BT = whole.first_BT[:, start:stop], whole.visible_BT[:, start:stop]
        self.positions_BC = whole.positions_BC


class Windows:
    """What a part pools, in ``compressor``'s terms: slot 0 is the entry before the first that closes in the part (with
    overlap, that one reads its window), then those that close in it, then slots that nobody reads.

    Attributes:
        count: slots, the same in every part.
        tokens: ``[B·c·m]`` into the key tokens ``[B·X]``; inverse: ``[B·X]`` back, -1 in no window.
        positions_BC: of a window's first token, as in ``Entries``.
        order: ``[B·C]``: where the row's entries are among the slots of all parts ``[B·R·c]``.
    """

    def __init__(self, part: RowPart, rate: int):
        whole, entries = part.whole, part.whole.entries(rate)
        B, C, T, device = part.B, entries.count, part.T, part.device
        self.rate, self.single = rate, False
        self.count = c = -(-T // rate) + 1 if C else 0
        if not C:
            return
        rows_B1 = torch.arange(B, device=device)[:, None]
        last_BC = entries.tokens.view(B, C, rate)[..., -1] - rows_B1 * whole.T
        closed_BT = ((whole.local_BT + 1) % rate == 0).cumsum(1)
        # Entries of the row that close before each part begins, and after the last one has ended.
        upto_BR = torch.cat([torch.zeros_like(closed_BT[:, :1]), closed_BT[:, T - 1 :: T]], 1)

        slots_C = torch.arange(C, device=device)
        owner_BC = last_BC // T
        held_BC = owner_BC * c + slots_C - upto_BR.gather(1, owner_BC) + 1
        held_BC = torch.where(slots_C < upto_BR[:, -1:], held_BC, 0)
        self.order = (held_BC + rows_B1 * (part.ranks * c)).flatten()

        at_Bc = upto_BR[:, part.rank, None] - 1 + torch.arange(c, device=device)
        some_Bc = (at_Bc >= 0) & (at_Bc < upto_BR[:, part.rank + 1, None])
        at_Bc = at_Bc.clamp(0, C - 1)
        first_Bc = last_BC.gather(1, at_Bc) - (rate - 1) - part.start + part.before
        some_Bc &= first_Bc >= 0  # else it closed long before, and no entry of this part reads its window
        tokens_Bcm = torch.where(some_Bc, first_Bc, 0)[..., None] + torch.arange(rate, device=device)
        X = part.before + T
        self.tokens = (tokens_Bcm + rows_B1[..., None] * X).flatten()
        self.positions_BC = entries.positions_BC.gather(1, at_Bc)
        target = torch.where(some_Bc[..., None].expand_as(tokens_Bcm).flatten(), self.tokens, B * X)
        inverse = torch.full((B * X + 1,), -1, dtype=torch.long, device=device)
        self.inverse = inverse.scatter_(0, target, torch.arange(len(target), device=device))[:-1]


class RowPart(Geometry):
    """Geometry of the queries of part ``rank`` of ``ranks``, with ``before`` tokens of keys in front of their own.

    ``start_BT`` counts from the part's first token: a document that began before the part starts below zero.

    Raises:
        ValueError: the parts don't divide the rows, or are shorter than ``before``.
    """

    def __init__(self, whole: Geometry, rank: int, ranks: int, before: int):
        T = whole.T // ranks
        if whole.T % ranks or before > T:
            raise ValueError(
                f"Rows of {whole.T} tokens can't be cut into {ranks} parts of at least {before} tokens: take fewer "
                f"parts."
            )
        self._whole, self.rank, self.ranks, self.before = whole, rank, ranks, before
        self.B, self.T, self.device, self.single = whole.B, T, whole.device, False
        self.start, self.stop = rank * T, (rank + 1) * T
        own = (slice(None), slice(self.start, self.stop))
        self.position_BT, self.local_BT, self.length_BT, self.real_BT = (
            x[own] for x in (whole.position_BT, whole.local_BT, whole.length_BT, whole.real_BT)
        )
        self.start_BT = whole.start_BT[own] - self.start
        self._entries, self._windows, self._plans = {}, {}, {}

    @property
    def whole(self) -> Geometry:
        return self._whole

    @property
    def key_position_BX(self) -> Tensor:
        """Positions of the key tokens; 0 where there are none, before the row."""
        first = self.start - self.before
        found_BX = self.whole.position_BT[:, max(first, 0) : self.stop]
        return torch.nn.functional.pad(found_BX, (max(-first, 0), 0))

    def entries(self, rate: int) -> PartEntries:
        if rate not in self._entries:
            self._entries[rate] = PartEntries(self.whole.entries(rate), self.start, self.stop)
        return self._entries[rate]

    def windows(self, rate: int) -> Windows:
        if rate not in self._windows:
            self._windows[rate] = Windows(self, rate)
        return self._windows[rate]
