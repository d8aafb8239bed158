"""How ``generate`` has a model go on with texts: prefill, then a token of each at a time.

A model that keeps what it knows of its texts (a key-value cache) gives a ``Decoding`` by ``start_decoding()``; any
other is run over the whole texts again by ``Recomputing``. Legend: R rows, D model, V vocabulary, L MoE layers,
k experts of a token.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lab_utils.models.base import TrainableModel

ROW_TOKENS = 512  # a row holds several short texts
BATCH_TOKENS = 8192  # tokens of one forward pass


class Decoded(NamedTuple):
    """What follows each text."""

    logits_RV: Tensor  # fp32
    routing: (
        list[Tensor] | None
    )  # experts of the tokens that were fed, [tokens, L, k] on the host, for each row


class Decoding(Protocol):
    """Texts that a model is going on with, in rows ``0 …``. Rows are kept without a gap: see ``drop``."""

    def batches(self, texts: list[list[int]]) -> list[list[int]]:
        """Which of these texts are best prefilled together."""

    def prefill(self, texts: list[list[int]], *, want_routing: bool = False) -> Decoded:
        """Add a row for each text, behind those that are there; one forward pass."""

    def step(self, tokens: list[int], *, want_routing: bool = False) -> Decoded:
        """Feed the next token of each of the first ``len(tokens)`` rows."""

    def drop(self, row: int) -> None:
        """Forget a row; the last one takes its place."""

    def idle(self) -> None:
        """A forward pass for nothing: where ranks share experts, every one of them must run as many."""


def start_decoding(model: TrainableModel) -> Decoding:
    """The model's own way to decode, or the whole texts again for every token."""
    own = getattr(model, "start_decoding", None)
    return own() if own is not None else Recomputing(model)


class Recomputing:
    """Every token from its whole text, texts packed in rows: right for any ``TrainableModel``, and what a cache is
    compared with. Its cost grows with the square of the length."""

    def __init__(self, model: TrainableModel, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model, self.batch_tokens = model, batch_tokens
        self.texts: list[list[int]] = []

    def batches(self, texts: list[list[int]]) -> list[list[int]]:
        """Texts in their order, as many together as ``batch_tokens`` holds (or one)."""
        found: list[list[int]] = []
        room = 0
        for i, text in enumerate(texts):
            if len(text) > room:
                found.append([])
                room = max(self.batch_tokens, len(text))
            found[-1].append(i)
            room -= len(text)
        return found

    def prefill(self, texts: list[list[int]], *, want_routing: bool = False) -> Decoded:
        self.texts += [list(text) for text in texts]
        return self._all(texts, want_routing)

    def step(self, tokens: list[int], *, want_routing: bool = False) -> Decoded:
        for text, token in zip(self.texts, tokens, strict=False):
            text.append(token)
        texts = self.texts[: len(tokens)]
        parts = self.batches(texts)
        found = [self._all([texts[i] for i in part], want_routing) for part in parts]
        routing = [each[-1:] for part in found for each in part.routing or []]
        return Decoded(torch.cat([part.logits_RV for part in found]), routing if want_routing else None)

    def drop(self, row: int) -> None:
        last = self.texts.pop()
        if row < len(self.texts):
            self.texts[row] = last

    def idle(self) -> None:
        self._all([[0]], False)

    @torch.no_grad()
    def _all(self, texts: list[list[int]], want_routing: bool) -> Decoded:
        return Decoded(*_last_logits(self.model, texts, want_routing))


def _last_logits(
    model: TrainableModel, texts: list[list[int]], want_routing: bool
) -> tuple[Tensor, list[Tensor] | None]:
    """fp32 logits ``[R, V]`` behind each text, and the routing of its tokens; texts lie packed in rows."""
    device = model.head_weight.device
    width = max(ROW_TOKENS, *(len(text) for text in texts))
    places: list[tuple[int, int]] = []  # row and first token of each text
    row, filled = 0, 0
    for text in texts:
        if filled + len(text) > width:
            row, filled = row + 1, 0
        places.append((row, filled))
        filled += len(text)
    ids = torch.zeros(row + 1, width, dtype=torch.long)
    documents = torch.full_like(ids, -1)
    positions = torch.arange(width).repeat(row + 1, 1)
    for number, (text, (r, start)) in enumerate(zip(texts, places)):
        end = start + len(text)
        ids[r, start:end] = torch.tensor(text)
        documents[r, start:end] = number
        positions[r, start:end] = torch.arange(len(text))
        positions[r, end:] = torch.arange(width - end)  # padding, until another text takes the place
    with model.record_routing() if want_routing else nullcontext() as record:
        hidden_BTD = model(ids.to(device), positions.to(device), documents.to(device)).hidden_BTD
    at_row = torch.tensor([r for r, _ in places], device=device)
    last = torch.tensor([start + len(text) - 1 for text, (_, start) in zip(texts, places)], device=device)
    routes = None
    if want_routing:
        routing = record.to_rows(row + 1).cpu()
        routes = [routing[r, start : start + len(text)].clone() for text, (r, start) in zip(texts, places)]
    return hidden_BTD[at_row, last].float() @ model.head_weight.float().T, routes
