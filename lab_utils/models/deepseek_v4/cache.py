"""What attention remembers of texts that are being gone on with, and one token of each of them against it.

A text is a row. Of each layer a row holds the last ``window`` keys as a ring, every compressed entry, and of each pool
(the compressor, the indexer) the projections of those last tokens that the next entry pools: m of them in HCA, 2m in
CSA, whose entries overlap. So a row of a V4 grows by K/m numbers a token and compressed layer, and by nothing else.

Legend: R rows, B rows of a prefill, T tokens, D model, H heads, K head dimension, I indexer dimension, w window,
m compression rate, Y tokens that an entry pools, F width of the pools' projections, C entries, S selected entries,
X keys, N rows whose next entry is whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels._support import break_ties, full_dtype, working_dtype
from kernels.rms_norm.torch import inverse_rms
from kernels.rope.torch import rotate_
from lab_utils.models.deepseek_v4.layers import operator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lab_utils.models.deepseek_v4.attention import Attention, Pool
    from lab_utils.models.deepseek_v4.rotary import Rotary

Angles = tuple[Tensor, Tensor]  # cos and sin
GROWTH = 64  # entries that room is made for at a time, at the least


@dataclass
class Closing:
    """Rows whose token just fed closes a window of a pool: the next entry of each can be computed."""

    rows_N: Tensor
    order_NY: Tensor  # places in the pool's ring, oldest token first
    fresh_N11: Tensor | None  # the text's first window: none before it to overlap with
    entry_N: Tensor  # number of the entry in its text
    angles: Angles


@dataclass
class Step:
    """One token of each row: where it stands, and what all layers of a kind read alike (made once)."""

    positions: list[int]
    position_R: Tensor
    rotary: Rotary
    dense: bool  # nothing is selected
    rows_R: Tensor = field(init=False)
    longest: int = field(init=False)
    _made: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.longest = max(self.positions)
        self.rows_R = torch.arange(len(self.positions), device=self.position_R.device)

    def place(self, ring: int) -> Tensor:
        """Of the token in a ring of this size ``[R]``."""
        return self._once(("place", ring), lambda: self.position_R % ring)

    def entries(self, rate: int) -> int:
        """The most entries that a row sees."""
        return (self.longest + 1) // rate

    def bias(self, window: int, rate: int | None, columns: int) -> Tensor:
        """0 where a row sees a key, else -inf: ``[R, 1, 1 + w + columns]``, the first column being the sink's."""
        return self._once(("bias", window, rate, columns), lambda: self._bias(window, rate, columns))

    def _bias(self, window: int, rate: int | None, columns: int) -> Tensor:
        device = self.position_R.device
        hidden = torch.arange(-1, window, device=device) > self.position_R[:, None]
        if rate is not None:
            hidden = torch.cat([hidden, self.hidden(rate, columns)], 1)
        return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))[:, None]

    def hidden(self, rate: int, entries: int) -> Tensor:
        """Which of so many entries a row does not see ``[R, entries]``."""
        device = self.position_R.device
        make = lambda: torch.arange(entries, device=device) >= ((self.position_R + 1) // rate)[:, None]  # noqa: E731
        return self._once(("hidden", rate, entries), make)

    def closing(self, rate: int, overlap: bool) -> Closing | None:
        return self._once(("closing", rate, overlap), lambda: self._closing(rate, overlap))

    def _closing(self, rate: int, overlap: bool) -> Closing | None:
        rows = [row for row, position in enumerate(self.positions) if (position + 1) % rate == 0]
        if not rows:
            return None
        device, Y = self.position_R.device, rate * (2 if overlap else 1)
        rows_N = torch.tensor(rows, device=device)
        next_N = self.position_R[rows_N] + 1
        entry_N = next_N // rate - 1
        order_NY = (next_N[:, None] + torch.arange(Y, device=device)) % Y
        fresh = (entry_N == 0)[:, None, None] if overlap else None
        return Closing(rows_N, order_NY, fresh, entry_N, self.rotary("compress", entry_N * rate))

    def _once(self, key: tuple, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass
class Filling:
    """A prefill: texts at the start of rows ``[B, T]``, and the rows of the cache that they go to."""

    rows_B: Tensor
    length_B: Tensor

    def tail(self, ring: int) -> tuple[Tensor, Tensor]:
        """Positions of the last tokens of each text ``[B, ring]`` (0 again where there are fewer), their places."""
        steps = torch.arange(-ring, 0, device=self.length_B.device)
        position = (self.length_B[:, None] + steps).clamp(min=0)
        return position, position % ring


@dataclass
class Caching:
    """What a forward pass does with the caches of its layers: fills them from whole texts, or takes a step."""

    layers: dict[Attention, AttentionCache]
    filling: Filling | None = None
    step: Step | None = None


class AttentionCache:
    """Of one attention block, and its weights as a step wants them: those of one input side by side, and the pools of
    compressor and indexer as one.

    Attributes:
        keys_RXK: a row of zeros that carries the sink (its score is the sink, its value nothing), the window as a ring,
            then the compressed entries in order.
        index_RCI: the indexer's keys.
        ring_RYF: projections, kv then gate, of the last tokens that an entry pools, as a ring.
    """

    def __init__(self, attention: Attention, rows: int) -> None:
        self.attention, self.start = attention, 1 + attention.window
        weight = attention.kv_norm.weight.detach()
        self.keys_RXK = weight.new_zeros(rows, self.start, len(weight), dtype=working_dtype(weight))
        self.index_RCI = self.ring_RYF = None
        compressor = attention.compressor
        self.indexer = compressor.indexer if compressor else None
        self.pools: list[Pool] = [pool for pool in (compressor, self.indexer) if pool is not None]
        into = [attention.q_a_proj.weight, attention.kv_proj.weight]
        queries = [attention.q_b_proj.weight]
        if compressor:
            self.rate, self.overlap = compressor.rate, compressor.overlap
            projections = self._merged(pool.kv_proj.weight for pool in self.pools)
            gates = self._merged(pool.gate_proj.weight for pool in self.pools)
            into.append(torch.cat([projections, gates]))
            self.bias_mF = self._merged(pool.position_bias.T for pool in self.pools).T.contiguous()
            self.ring = self.rate * (2 if self.overlap else 1)
            self.ring_RYF = weight.new_zeros(rows, self.ring, len(into[-1]))
        if self.indexer is not None:
            key = self.indexer.kv_norm.weight
            self.index_RCI = weight.new_zeros(rows, 0, len(key), dtype=working_dtype(weight))
            into.append(self.indexer.scorer.weights_proj.weight)
            queries.append(self.indexer.q_b_proj.weight)
        self.into, self.into_sizes = torch.cat([part.detach() for part in into]), [len(part) for part in into]
        self.queries = torch.cat([part.detach() for part in queries])
        self.query_sizes = [len(part) for part in queries]

    def _merged(self, weights: Iterable[Tensor]) -> Tensor:
        """Projections ``[F, …]`` of several pools as those of one: where entries overlap, the halves of all that a
        window gives to the entry after it come first."""
        halves = zip(*(weight.detach().chunk(2 if self.overlap else 1) for weight in weights), strict=True)
        return torch.cat([part for half in halves for part in half])

    def held(self) -> list[str]:
        """Names of the attributes whose first dimension is the rows."""
        names = ("keys_RXK", "index_RCI", "ring_RYF")
        return [name for name in names if getattr(self, name) is not None]

    def fill(
        self,
        x_BTD: Tensor,
        kv_BTK: Tensor,
        entries_BCK: Tensor | None,
        index_keys_BCI: Tensor | None,
        filling: Filling,
    ) -> None:
        """Keep the last keys and all entries of the texts of a prefill."""
        b_B1, rows_B1 = torch.arange(len(x_BTD), device=x_BTD.device)[:, None], filling.rows_B[:, None]
        position_BW, place_BW = filling.tail(self.start - 1)
        self.keys_RXK[rows_B1, 1 + place_BW] = kv_BTK[b_B1, position_BW].to(self.keys_RXK.dtype)
        if self.ring_RYF is None:
            return
        position_BY, place_BY = filling.tail(self.ring)
        pooled = slice(sum(self.into_sizes[:2]), sum(self.into_sizes[:3]))
        self.ring_RYF[rows_B1, place_BY] = operator("linear", x_BTD)(
            x_BTD[b_B1, position_BY], self.into[pooled]
        )
        C = entries_BCK.shape[1]
        # Entries behind a text's own are overwritten as the text grows into them; until then nobody sees them.
        self._make_room(C)
        self.keys_RXK[filling.rows_B, self.start : self.start + C] = entries_BCK.to(self.keys_RXK.dtype)
        if self.indexer is not None:
            self.index_RCI[filling.rows_B, :C] = index_keys_BCI.to(self.index_RCI.dtype)

    def step(self, x_R1D: Tensor, angles: Angles, step: Step) -> Tensor:
        """Attention output ``[R, 1, H, K]`` of the next token of each row; see ``kernels/shared_kv_attention``."""
        attention, linear = self.attention, operator("linear", x_R1D)
        x_RD, R, dtype = x_R1D[:, 0], len(step.positions), self.keys_RXK.dtype
        q_a, kv_RK, *pooled = linear(x_RD, self.into).split(self.into_sizes, 1)
        queries = linear(attention.q_a_norm(q_a), self.queries).split(self.query_sizes, 1)
        q_RHK = queries[0].view(R, attention.heads, -1).to(dtype)
        kv_R1K = rotate_(attention.kv_norm(kv_RK)[:, None], *angles)
        self.keys_RXK[step.rows_R, 1 + step.place(self.start - 1)] = kv_R1K[:, 0].to(dtype)
        selected_RS = None
        if self.ring_RYF is not None:
            self._pool(pooled[0], step)
            if self.indexer is not None and not step.dense and step.entries(self.rate) > self.indexer.topk:
                selected_RS = self._select(queries[1], pooled[1], angles, step)
        keys_RXK, bias_R1X = self._attended(selected_RS, step)
        scale = inverse_rms(q_RHK.to(full_dtype(q_RHK)), attention.eps).to(dtype)
        q_RHK = rotate_(q_RHK * (scale * q_RHK.shape[-1] ** -0.5), *angles)
        scores = torch.bmm(q_RHK, keys_RXK.transpose(1, 2))
        scores = scores.to(full_dtype(scores)).add_(bias_R1X)
        scores[:, :, 0] = attention.sinks
        out_RHK = torch.bmm(scores.softmax(-1).to(dtype), keys_RXK)
        return rotate_(out_RHK, *angles, inverse=True)[:, None].to(x_R1D.dtype)

    def _pool(self, projected_RF: Tensor, step: Step) -> None:
        """Take a token into the rings, and the entries that it closes into the caches; see ``kernels/compressor``."""
        self.ring_RYF[step.rows_R, step.place(self.ring)] = projected_RF
        closing = step.closing(self.rate, self.overlap)
        if closing is None:
            return
        full, m = full_dtype(projected_RF), self.rate
        kv, gate = self.ring_RYF[closing.rows_N[:, None], closing.order_NY].to(full).chunk(2, 2)
        bias = self.bias_mF.to(full)
        if self.overlap:
            half = kv.shape[2] // 2
            before = (gate[:, :m, :half] + bias[:, :half]).masked_fill(closing.fresh_N11, float("-inf"))
            gate = torch.cat([before, gate[:, m:, half:] + bias[:, half:]], 1)
            kv = torch.cat([kv[:, :m, :half], kv[:, m:, half:]], 1)
        else:
            gate = gate + bias
        pooled = (kv * gate.softmax(1)).sum(1).to(projected_RF.dtype)
        parts = pooled.split([len(pool.kv_norm.weight) for pool in self.pools], 1)
        self._make_room(step.entries(m))
        entries, *keys = (
            rotate_(pool.kv_norm(part), *closing.angles) for pool, part in zip(self.pools, parts, strict=True)
        )
        self.keys_RXK[closing.rows_N, self.start + closing.entry_N] = entries.to(self.keys_RXK.dtype)
        if keys:
            self.index_RCI[closing.rows_N, closing.entry_N] = keys[0].to(self.index_RCI.dtype)

    def _select(self, q_RX: Tensor, scored_RH: Tensor, angles: Angles, step: Step) -> Tensor:
        """Entries that each row attends ``[R, S]``, -1 where there are fewer; see ``kernels/indexer_select``."""
        indexer, R, C = self.indexer, len(q_RX), step.entries(self.rate)
        q_RHI = rotate_(q_RX.reshape(R, indexer.heads, -1), *angles).to(self.index_RCI.dtype)
        dots = torch.bmm(q_RHI, self.index_RCI[:R, :C].transpose(1, 2)).relu_()
        dots = dots.to(full_dtype(dots))
        weights_R1H = (scored_RH.float() * indexer.scorer.factor)[:, None].to(dots.dtype)
        scores_RC = break_ties(torch.bmm(weights_R1H, dots)[:, 0])
        scores_RC.masked_fill_(step.hidden(self.rate, C), float("-inf"))
        values, selected_RS = scores_RC.topk(indexer.topk, -1)
        return torch.where(values == float("-inf"), -1, selected_RS)

    def _attended(self, selected_RS: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """Keys ``[R, X, K]`` and what is added to their scores ``[R, 1, X]``."""
        R, window = len(step.positions), self.start - 1
        if selected_RS is None:
            rate = self.rate if self.pools else None
            C = step.entries(rate) if rate else 0
            return self.keys_RXK[:R, : self.start + C], step.bias(window, rate, C)
        chosen_RSK = self.keys_RXK[step.rows_R[:, None], self.start + selected_RS.clamp(min=0)]
        none_RS = torch.zeros(selected_RS.shape, device=selected_RS.device)
        none_RS.masked_fill_(selected_RS < 0, float("-inf"))
        keys_RXK = torch.cat([self.keys_RXK[:R, : self.start], chosen_RSK], 1)
        return keys_RXK, torch.cat([step.bias(window, None, 0), none_RS[:, None]], 2)

    def _make_room(self, entries: int) -> None:
        self.keys_RXK = _with_room(self.keys_RXK, self.start + entries)
        if self.indexer is not None:
            self.index_RCI = _with_room(self.index_RCI, entries)


def _with_room(x_RX: Tensor, columns: int) -> Tensor:
    """The tensor, wider where it has fewer columns; by at least a half, so that growing costs little a token."""
    have = x_RX.shape[1]
    if columns <= have:
        return x_RX
    wider = max(columns + GROWTH, have + have // 2)
    out = x_RX.new_zeros(x_RX.shape[0], wider, *x_RX.shape[2:])
    out[:, :have] = x_RX
    return out
