"""DeepSeek-V4 going on with texts: a prefill fills the caches of ``cache.py``, a step feeds a token of each row.

Legend: R rows, B rows of a prefill, T tokens, n streams, D model, L MoE layers, k experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.geometry import Geometry
from lab_utils.models.base import RoutingRecord
from lab_utils.models.decoding import BATCH_TOKENS, Decoded
from lab_utils.models.deepseek_v4.block import Pass
from lab_utils.models.deepseek_v4.cache import AttentionCache, Caching, Filling, Step
from lab_utils.models.deepseek_v4.cpu_step import CpuStep, runs
from lab_utils.models.deepseek_v4.layers import Context

if TYPE_CHECKING:
    from lab_utils.models.deepseek_v4.model import DeepseekV4

PADDING = 0.25  # of a prefill's tokens that may be padding


@dataclass(frozen=True)
class _Positions:
    """All that a step needs of a geometry."""

    position_BT: Tensor


class DeepseekV4Decoding:
    """A ``Decoding`` with a key-value cache."""

    def __init__(self, model: DeepseekV4) -> None:
        self.model = model
        self.lengths: list[int] = []
        self.capacity = 0
        self.layers: dict = {}
        self._head: Tensor | None = None
        self._on_cpu: CpuStep | None = None

    def batches(self, lengths: list[int]) -> list[list[int]]:
        """Texts of like lengths together: every one has a row of its own, as wide as the longest."""
        found: list[list[int]] = []
        batch: list[int] = []
        tokens = 0
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            padded, tokens = lengths[i] * (len(batch) + 1), tokens + lengths[i]
            if batch and (padded > BATCH_TOKENS or padded - tokens > PADDING * padded):
                found.append(batch)
                batch, tokens = [], lengths[i]
            batch.append(i)
        return [*found, batch] if batch else found

    @torch.no_grad()
    def prefill(self, texts: list[list[int]], *, want_routing: bool = False) -> Decoded:
        device = self.model.head_weight.device
        rows = range(len(self.lengths), len(self.lengths) + len(texts))
        self._make_room(rows.stop)
        lengths = [len(text) for text in texts]
        width = max(lengths)
        ids_BT = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
        length_B = torch.tensor(lengths, device=device)
        context = self._context(ids_BT)
        context.caching = Caching(self.layers, Filling(torch.tensor(rows, device=device), length_B))
        h_BTnD, record = self._run(context, want_routing)
        self.lengths += lengths
        last_B = torch.arange(len(texts), device=device)
        logits_BV = self._logits(h_BTnD[last_B, length_B - 1][:, None])
        routing = None
        if record is not None:
            routing_BTLk = record.to_rows(len(texts)).cpu()
            routing = [routing_BTLk[b, :length].clone() for b, length in enumerate(lengths)]
        return Decoded(logits_BV, routing)

    @torch.no_grad()
    def step(self, tokens: list[int], *, want_routing: bool = False) -> Decoded:
        model, device = self.model, self.model.head_weight.device
        R = len(tokens)
        positions = self.lengths[:R]
        step = Step(positions, torch.tensor(positions, device=device), model.rotary, model.warmup)
        self.lengths[:R] = [position + 1 for position in positions]
        if self._on_cpu is not None:
            hidden_RD, experts = self._on_cpu(tokens, step)
            routing = torch.from_numpy(experts).to(torch.int16) if want_routing else None
            return Decoded(self._project(hidden_RD), None if routing is None else list(routing[:, None]))
        context = Context(
            torch.tensor(tokens, device=device)[:, None],
            _Positions(step.position_R[:, None]),
            model.rotary,
            indexer_loss=False,
            dense=model.warmup,
            caching=Caching(self.layers, step=step),
        )
        h_RnD, record = self._run(context, want_routing)
        routing = list(record.to_rows(R).cpu()) if record is not None else None
        return Decoded(self._logits(h_RnD), routing)

    def drop(self, row: int) -> None:
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if row == last:
            return
        self.lengths[row] = length
        for cache in self.layers.values():
            for name in cache.held():
                tensor = getattr(cache, name)
                tensor[row] = tensor[last]

    @torch.no_grad()
    def idle(self) -> None:
        self._run(
            self._context(torch.zeros(1, 1, dtype=torch.long, device=self.model.head_weight.device)), False
        )

    def _context(self, ids_BT: Tensor) -> Context:
        """Of whole texts. What follows one in its row counts as its own: nothing before sees it, and every row is a
        single document."""
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).repeat(len(ids_BT), 1)
        geometry = Geometry(positions_BT, torch.zeros_like(ids_BT))
        return Context(ids_BT, geometry, self.model.rotary, indexer_loss=False, dense=self.model.warmup)

    def _run(self, context: Context, want_routing: bool) -> tuple[Tensor, RoutingRecord | None]:
        """The streams after the last layer ``[B, T, n, D]``, and the experts that were chosen."""
        model = self.model
        record = RoutingRecord() if want_routing else None
        at = Pass(context, again="none", count=False, given=[], record=record)
        h_BTnD = model.embed(context.input_ids)
        for number, layer in enumerate(model.model.layers):
            h_BTnD = at.run(layer, number, h_BTnD)
        return h_BTnD, record

    def _logits(self, h_R1nD: Tensor) -> Tensor:
        """fp32 logits ``[R, V]``."""
        decoder = self.model.model
        return self._project(decoder.norm(decoder.hc_head(h_R1nD))[:, 0])

    def _project(self, hidden_RD: Tensor) -> Tensor:
        if self._head is None:
            self._head = self.model.head_weight.float()  # once, not for every token
        return hidden_RD.float() @ self._head.T

    def _make_room(self, rows: int) -> None:
        """Caches of at least so many rows."""
        if not self.layers:
            self.capacity = rows
            attentions = [layer.self_attn for layer in self.model.model.layers]
            self.layers = {attention: AttentionCache(attention, rows) for attention in attentions}
            self._on_cpu = CpuStep(self.model, self.layers) if runs(self.model) else None
        if rows <= self.capacity:
            return
        self.capacity = max(rows, self.capacity + self.capacity // 2)
        for cache in self.layers.values():
            for name in cache.held():
                old = getattr(cache, name)
                new = old.new_zeros(self.capacity, *old.shape[1:])
                new[: len(old)] = old
                setattr(cache, name, new)
