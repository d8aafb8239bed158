"""DeepSeek-V4 going on with texts: a prefill fills the caches of ``cache.py``, a step feeds a token of each row.

In a pipeline every stage keeps the caches of its layers; passes go through the stages in single file, and the logits
come back to all of them, so that each draws the same tokens.

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
    from lab_utils.models.deepseek_v4.pipeline import Stage

PADDING = 0.25  # of a prefill's tokens that may be padding


@dataclass(frozen=True)
class _Positions:
    """All that a step needs of a geometry."""

    position_BT: Tensor


class DeepseekV4Decoding:
    """A ``Decoding`` with a key-value cache."""

    def __init__(self, model: DeepseekV4) -> None:
        self.model = model
        self.stage: Stage | None = getattr(model, "stage", None)
        self.held = [i for start, stop in self._ranges() for i in range(start, stop)]
        # Of the streams' dtype and device; in a pipeline, the other stages' weights are not there.
        self.like = model.model.layers[self.held[0]].self_attn.kv_norm.weight
        self.lengths: list[int] = []
        self.capacity = 0
        self.layers: dict = {}
        self._head: Tensor | None = None
        self._on_cpu: CpuStep | None = None

    def batches(self, texts: list[list[int]]) -> list[list[int]]:
        """Texts of like lengths together: each has a row of its own, as wide as the longest. Equal ones are one row."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, text in enumerate(texts):
            alike.setdefault(tuple(text), []).append(i)
        found: list[list[int]] = []
        tokens = rows = 0
        for text in sorted(alike, key=len):
            tokens, rows = tokens + len(text), rows + 1
            padded = len(text) * rows
            if not found or padded > BATCH_TOKENS or padded - tokens > PADDING * padded:
                found.append([])
                tokens, rows = len(text), 1
            found[-1] += alike[text]
        return found

    @torch.no_grad()
    def prefill(self, texts: list[list[int]], *, want_routing: bool = False) -> Decoded:
        device, first = self.like.device, len(self.lengths)
        self._make_room(first + len(texts))
        # Answers to one prompt share its pass: the others' caches are copies.
        owners: dict[tuple[int, ...], int] = {}
        owner = [owners.setdefault(tuple(text), i) for i, text in enumerate(texts)]
        computed = list(owners.values())
        place = {i: b for b, i in enumerate(computed)}
        lengths = [len(texts[i]) for i in computed]
        width = max(lengths)
        ids_BT = torch.tensor([texts[i] + [0] * (width - len(texts[i])) for i in computed], device=device)
        length_B = torch.tensor(lengths, device=device)
        context = self._context(ids_BT)
        rows_B = torch.tensor([first + i for i in computed], device=device)
        context.caching = Caching(self.layers, Filling(rows_B, length_B))
        h_BTnD, record = self._run(context, want_routing)
        copies = [i for i in range(len(texts)) if owner[i] != i]
        self._copy([first + owner[i] for i in copies], [first + i for i in copies])
        self.lengths += [len(text) for text in texts]
        if h_BTnD is not None:
            h_BTnD = h_BTnD[torch.arange(len(computed), device=device), length_B - 1][:, None]
        logits_BV = self._logits(h_BTnD, len(computed))
        routing = None
        if record is not None:
            routing_BTLk = record.to_rows(len(computed)).cpu()
            routing = [
                routing_BTLk[place[i], : len(text)].clone() for i, text in zip(owner, texts, strict=True)
            ]
        of_text = torch.tensor([place[i] for i in owner], device=device)
        return Decoded(logits_BV[of_text], routing)

    @torch.no_grad()
    def step(self, tokens: list[int], *, want_routing: bool = False) -> Decoded:
        model, device = self.model, self.like.device
        R = len(tokens)
        positions = self.lengths[:R]
        self.lengths[:R] = [position + 1 for position in positions]
        if self._on_cpu is not None:
            logits_RV, experts = self._on_cpu(tokens, positions)
            routing = torch.from_numpy(experts).to(torch.int16) if want_routing else None
            return Decoded(logits_RV, None if routing is None else list(routing[:, None]))
        step = Step(positions, torch.tensor(positions, device=device), model.rotary, model.warmup)
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
        return Decoded(self._logits(h_RnD, R), routing)

    def drop(self, row: int) -> None:
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if row == last:
            return
        self.lengths[row] = length
        self._copy([last], [row])

    def _copy(self, rows: list[int], to: list[int]) -> None:
        for cache in self.layers.values() if rows else ():
            for name in cache.held():
                tensor = getattr(cache, name)
                tensor[to] = tensor[rows]

    @torch.no_grad()
    def idle(self) -> None:
        self._run(self._context(torch.zeros(1, 1, dtype=torch.long, device=self.like.device)), False)

    def _context(self, ids_BT: Tensor) -> Context:
        """Of whole texts. What follows one in its row counts as its own: nothing before sees it, and every row is a
        single document."""
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).repeat(len(ids_BT), 1)
        geometry = Geometry(positions_BT, torch.zeros_like(ids_BT))
        return Context(ids_BT, geometry, self.model.rotary, indexer_loss=False, dense=self.model.warmup)

    def _ranges(self) -> list[tuple[int, int]]:
        """Layers of this rank, in order."""
        return [(0, len(self.model.model.layers))] if self.stage is None else self.stage.ranges

    def _run(self, context: Context, want_routing: bool) -> tuple[Tensor | None, RoutingRecord | None]:
        """The streams after the last layer ``[B, T, n, D]`` (None but on the last stage), and the experts chosen."""
        model, ids_BT = self.model, context.input_ids
        record = RoutingRecord() if want_routing else None
        at = Pass(context, again="none", count=False, given=[], record=record)

        def run(h_BTnD: Tensor | None, start: int, stop: int) -> Tensor:
            h_BTnD = model.embed(ids_BT) if h_BTnD is None else h_BTnD
            for number in range(start, stop):
                h_BTnD = at.run(model.model.layers[number], number, h_BTnD)
            return h_BTnD

        if self.stage is None:
            return run(None, *self._ranges()[0]), record
        shape = (*ids_BT.shape, model.config.hc_mult, model.config.hidden_size)
        h_BTnD = self.stage.in_file(run, shape, self.like)
        if record is not None:
            parts = self.stage.gathered(
                dict(zip(self.held, (each.cpu() for each in record.experts), strict=True))
            )
            layers = {number: experts for part in parts for number, experts in part.items()}
            record.experts = [layers[number] for number in sorted(layers)]
        return h_BTnD, record

    def _logits(self, h_R1nD: Tensor | None, rows: int) -> Tensor:
        """fp32 logits ``[R, V]``, on every stage."""
        decoder = self.model.model
        if h_R1nD is not None:
            logits_RV = self._project(decoder.norm(decoder.hc_head(h_R1nD))[:, 0])
        else:
            logits_RV = self.like.new_empty(rows, self.model.config.vocab_size, dtype=torch.float32)
        return logits_RV if self.stage is None else self.stage.from_last(logits_RV.contiguous())

    def _project(self, hidden_RD: Tensor) -> Tensor:
        if self._head is None:
            self._head = self.model.head_weight.float()  # once, not for every token
        return hidden_RD.float() @ self._head.T

    def _make_room(self, rows: int) -> None:
        """Caches of at least so many rows."""
        if not self.layers:
            self.capacity = rows
            attentions = [self.model.model.layers[number].self_attn for number in self.held]
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
