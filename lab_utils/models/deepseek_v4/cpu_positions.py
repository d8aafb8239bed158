"""Where the tokens of a decoding step on a CPU stand (``cpu_step.py``): what ``cache.Step`` says, as numpy's arrays.

Legend: R rows, X keys, C entries, N rows that close a window, Y tokens that an entry pools, w window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lab_utils.models.deepseek_v4.rotary import Rotary

Array = NDArray[np.float32]
GROWTH = 1024  # rotations that are made at a time, at the least
f32 = np.float32


class Turns:
    """RoPE's rotations as complex numbers, of all positions that were asked for yet."""

    def __init__(self, rotary: Rotary) -> None:
        self.rotary, self.tables = rotary, {}

    def __call__(self, kind: str, position_R: NDArray, longest: int) -> NDArray[np.complex64]:
        """``[R, pairs]``; ``longest``: no position is above."""
        table = self.tables.get(kind)
        if table is None or longest >= len(table):
            angles = self.rotary(kind, torch.arange(max(GROWTH, 2 * longest)))
            table = self.tables[kind] = torch.complex(*angles).numpy()
        return table[position_R]


class Now:
    """A token of each row: where it stands, and what all layers of a kind read alike (made once)."""

    def __init__(self, positions: list[int], turns: Turns, dense: bool) -> None:
        self.position_R = np.asarray(positions)
        self.rows_R = np.arange(len(positions))
        self.longest, self.shortest, self.dense = max(positions), min(positions), dense
        self.turns, self._made = turns, {}

    def entries(self, rate: int) -> int:
        """The most entries that a row sees."""
        return (self.longest + 1) // rate

    def turn(self, kind: str) -> NDArray[np.complex64]:
        """Rotation of each row ``[R, pairs]``."""
        return self._once(("turn", kind), lambda: self.turns(kind, self.position_R, self.longest))

    def place(self, ring: int) -> NDArray:
        """Of the token in a ring of this size ``[R]``."""
        return self._once(("place", ring), lambda: self.position_R % ring)

    def bias(self, window: int, rate: int | None) -> Array:
        """0 where a row sees a key, else -inf: ``[R, 1, 1 + w + C]``, the first column being the sink's."""

        def make() -> Array:
            C = self.entries(rate) if rate else 0
            bias_RX = np.zeros((len(self.rows_R), 1 + window + C), f32)
            if self.shortest < window:
                np.copyto(
                    bias_RX[:, 1 : 1 + window], -np.inf, where=np.arange(window) > self.position_R[:, None]
                )
            if C:
                bias_RX[:, 1 + window :] = self.hidden(rate)
            return bias_RX[:, None]

        return self._once(("bias", window, rate), make)

    def hidden(self, rate: int) -> Array:
        """-inf for entries that a row does not see, else 0: ``[R, C]``."""

        def make() -> Array:
            hidden_RC = np.arange(self.entries(rate)) >= ((self.position_R + 1) // rate)[:, None]
            return np.where(hidden_RC, f32(-np.inf), f32(0))

        return self._once(("hidden", rate), make)

    def closing(self, rate: int, overlap: bool) -> Closing | None:
        def make() -> Closing | None:
            next_R = self.position_R + 1
            rows_N = np.flatnonzero(next_R % rate == 0)
            if not len(rows_N):
                return None
            Y, next_N = rate * (2 if overlap else 1), next_R[rows_N]
            entry_N = next_N // rate - 1
            fresh = (entry_N == 0)[:, None, None] if overlap else None
            turn = self.turns("compress", entry_N * rate, self.longest)
            return Closing(rows_N, (next_N[:, None] + np.arange(Y)) % Y, fresh, entry_N, turn)

        return self._once(("closing", rate, overlap), make)

    def _once(self, key: tuple, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Closing(NamedTuple):
    """Rows whose token closes a window of a pool; ``cache.Closing`` as arrays."""

    rows_N: NDArray
    order_NY: NDArray
    fresh_N11: NDArray | None
    entry_N: NDArray
    turn: NDArray[np.complex64]
