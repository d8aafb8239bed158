"""Where documents, query blocks and compressed entries lie in packed rows ``[B, T]``.

Attention works in query blocks of W tokens: a block's keys are the ``window`` tokens before it, its own tokens, and one
contiguous range of compressed entries. Everything here is linear in T. Legend: B rows, T tokens, J blocks of a row,
W tokens of a block, S = window + W, C compressed entries of a row, L entries a block may see.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20  # scores held at once: two such fp32 buffers stay in a last-level cache


@dataclass(frozen=True)
class Chunk:
    """Rows ``row_0:row_1`` and blocks ``block_0:block_1`` worked on at once; ``entries`` = widest range of a block."""

    row_0: int
    row_1: int
    block_0: int
    block_1: int
    entries: int


class Entries:
    """Compressed entries of packed rows at one rate m: every document on its own, its short tail dropped (TR §2.3)."""

    def __init__(self, geometry: Geometry, rate: int):
        self.rate, self.count = rate, geometry.T // rate
        self.single = geometry.single
        B, T, C = geometry.B, geometry.T, self.count
        closes_BT = (geometry.local_BT + 1) % rate == 0
        closed_BT = closes_BT.cumsum(1)
        before_BT = closed_BT - closes_BT.long()
        # A query sees entries first .. first + visible of its row: those of its document whose window has closed.
        self.first_BT = before_BT.gather(1, geometry.start_BT)
        self.visible_BT = (geometry.local_BT + 1) // rate
        steps_T = torch.arange(T, device=geometry.device)
        slot_BT = torch.where(closes_BT, before_BT, C)
        last_BC = steps_T.new_full((B, C + 1), rate - 1)
        last_BC = last_BC.scatter_(1, slot_BT, steps_T.expand(B, T))[:, :C]
        self.positions_BC = geometry.local_BT.gather(1, last_BC) - (rate - 1) if C else last_BC
        # Slots beyond a row's last entry repeat the first tokens; no query sees them.
        window_m = torch.arange(rate, device=geometry.device) - (rate - 1)
        rows_B11 = (torch.arange(B, device=geometry.device) * T)[:, None, None]
        self.tokens = (last_BC[:, :, None] + window_m + rows_B11).reshape(-1)  # [B·C·m] into [B·T]
        inside_BT = geometry.local_BT < geometry.length_BT // rate * rate
        slot_BT = self.first_BT + geometry.local_BT // rate
        rows_B1 = (torch.arange(B, device=geometry.device) * C)[:, None]
        inverse_BT = (rows_B1 + slot_BT) * rate + geometry.local_BT % rate
        self.inverse = torch.where(inside_BT, inverse_BT, -1).reshape(
            -1
        )  # [B·T] into [B·C·m], -1: in no window


class Geometry:
    """Documents of packed rows, from position and document ids ``[B, T]`` (a new id, or position 0, starts one)."""

    # Of a part of the rows (``row_part``): its first token, and key tokens in front of it.
    start = before = 0

    def __init__(self, position_ids: Tensor, document_ids: Tensor):
        self.B, self.T = position_ids.shape
        self.device = position_ids.device
        self.position_BT = position_ids
        steps_T = torch.arange(self.T, device=self.device)
        new_BT = position_ids == 0
        new_BT[:, 1:] |= document_ids[:, 1:] != document_ids[:, :-1]
        new_BT[:, 0] = True
        self.start_BT = torch.where(new_BT, steps_T, 0).cummax(1).values
        self.local_BT = steps_T - self.start_BT
        document_BT = new_BT.cumsum(1) - 1
        lengths_BT = torch.zeros_like(document_BT).scatter_add_(1, document_BT, torch.ones_like(document_BT))
        self.length_BT = lengths_BT.gather(1, document_BT)
        self.real_BT = document_ids >= 0
        self.single = bool((self.start_BT == 0).all())  # one document a row: windows are plain reshapes
        self._entries: dict[int, Entries] = {}
        self._plans: dict[tuple[int, int, int | None, int], BlockPlan] = {}

    def entries(self, rate: int) -> Entries:
        if rate not in self._entries:
            self._entries[rate] = Entries(self, rate)
        return self._entries[rate]

    @property
    def whole(self) -> Geometry:
        """Of all tokens of the rows."""
        return self

    @property
    def key_position_BX(self) -> Tensor:
        """Positions of the tokens that are keys."""
        return self.position_BT

    def windows(self, rate: int) -> Entries:
        """What ``compressor`` pools of the key tokens."""
        return self.entries(rate)

    def plan(self, block: int, window: int, rate: int | None, heads: int) -> BlockPlan:
        """Query blocks of ``block`` tokens, for a window (0: entries only), a compression rate (None: no entries) and a
        number of query heads."""
        key = (block, window, rate, heads)
        if key not in self._plans:
            self._plans[key] = BlockPlan(self, block, window, self.entries(rate) if rate else None, heads)
        return self._plans[key]


class BlockPlan:
    """Query blocks of W tokens, grouped into chunks that are worked on at once."""

    def __init__(self, geometry: Geometry, block: int, window: int, entries: Entries | None, heads: int):
        self.geometry, self.block, self.window, self.entries = geometry, block, window, entries
        self.blocks = -(-geometry.T // block)
        B, J = geometry.B, self.blocks
        self.low_BJ = torch.zeros(B, J, dtype=torch.long, device=geometry.device)
        width_J = [0] * J
        if entries is not None and entries.count:
            self.first_BJW = self.blocked(entries.first_BT, fill=entries.count)
            self.end_BJW = self.blocked(entries.first_BT + entries.visible_BT, fill=0)
            self.low_BJ = self.first_BJW.amin(2)
            # The only copy to the host: the widest range of entries of each block, over the rows.
            width_J = (self.end_BJW.amax(2) - self.low_BJ).clamp_(min=0).amax(0).tolist()
        self.chunks = self._cut(width_J, heads)

    def blocked(self, x_BT: Tensor, fill: float = 0) -> Tensor:
        """``[B, T, …]`` as ``[B, J, W, …]``, padded at the end of the row."""
        pad = self.blocks * self.block - x_BT.shape[1]
        if pad:
            x_BT = torch.cat([x_BT, x_BT.new_full((x_BT.shape[0], pad, *x_BT.shape[2:]), fill)], 1)
        return x_BT.view(x_BT.shape[0], self.blocks, self.block, *x_BT.shape[2:])

    @cached_property
    def window_bias_BJWS(self) -> Tensor:
        """0 where a query of a block sees slot s of [window before | own block], else -inf; ``[B, J, W, S]`` fp32."""
        W, J, device = self.block, self.blocks, self.geometry.device
        start_BJW = self.blocked(self.geometry.start_BT, fill=self.geometry.T)
        query_JW = torch.arange(J * W, device=device).view(J, W)
        key_JS = torch.arange(self.window + W, device=device) + (query_JW[:, :1] - self.window)
        low_BJW = torch.maximum(start_BJW, query_JW - (self.window - 1))
        seen = (key_JS[:, None, :] <= query_JW[:, :, None]) & (key_JS[:, None, :] >= low_BJW[..., None])
        return torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))

    def _cut(self, width_J: list[int], heads: int) -> list[Chunk]:
        """Rectangles of rows and blocks: few blocks of many rows, because later blocks of a row see more entries."""
        B, J, fixed = self.geometry.B, self.blocks, 1 + self.window + self.block
        chunks: list[Chunk] = []
        block = 0
        while block < J:
            stop, total = block + 1, fixed + width_J[block]
            rows = max(1, min(B, CHUNK_ELEMENTS // (total * heads * self.block)))
            while stop < J and rows == B:
                wider = fixed + max(width_J[block : stop + 1])
                # A block that makes the others compute a good deal more than they need starts the next chunk.
                wasted = sum(wider - fixed - width for width in width_J[block : stop + 1])
                fits = (stop + 1 - block) * B * wider * heads * self.block <= CHUNK_ELEMENTS
                if not fits or 8 * wasted > (stop + 1 - block) * wider:
                    break
                stop += 1
            widest = max(width_J[block:stop])
            chunks += [Chunk(row, min(row + rows, B), block, stop, widest) for row in range(0, B, rows)]
            block = stop
        return chunks

    def entry_slots(self, chunk: Chunk) -> Tensor:
        """Row-local entry indices of each block's range, ``[G, L]`` (may run past a row's last entry; then unseen)."""
        low_G = self.low_BJ[chunk.row_0 : chunk.row_1, chunk.block_0 : chunk.block_1].reshape(-1)
        return low_G[:, None] + torch.arange(chunk.entries, device=low_G.device)

    def entry_seen(self, chunk: Chunk, slots_GL: Tensor) -> Tensor:
        """Which entries of its block's range each query may see, ``[G, W, L]`` bool."""
        W = self.block
        part = (slice(chunk.row_0, chunk.row_1), slice(chunk.block_0, chunk.block_1))
        first_GW = self.first_BJW[part].reshape(-1, W, 1)
        end_GW = self.end_BJW[part].reshape(-1, W, 1)
        return (slots_GL[:, None] >= first_GW) & (slots_GL[:, None] < end_GW)

    def take(self, x_BT: Tensor, chunk: Chunk, fill: float = 0) -> Tensor:
        """A chunk's tokens ``[G, W, …]``, padded with ``fill`` past the end of the row."""
        W, T = self.block, self.geometry.T
        x = x_BT[chunk.row_0 : chunk.row_1, chunk.block_0 * W : min(chunk.block_1 * W, T)]
        pad = (chunk.block_1 - chunk.block_0) * W - x.shape[1]
        if pad:
            x = torch.cat([x, x.new_full((x.shape[0], pad, *x.shape[2:]), fill)], 1)
        return x.reshape(-1, W, *x.shape[2:])

    def put(self, out_BT: Tensor, chunk: Chunk, x_GW: Tensor) -> None:
        """Write a chunk's ``[G, W, …]`` back into ``[B, T, …]``, dropping the padding."""
        W, T = self.block, self.geometry.T
        t0, t1 = chunk.block_0 * W, min(chunk.block_1 * W, T)
        rows = chunk.row_1 - chunk.row_0
        out_BT[chunk.row_0 : chunk.row_1, t0:t1] = x_GW.reshape(rows, -1, *x_GW.shape[2:])[:, : t1 - t0]
