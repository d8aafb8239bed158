"""Log-probabilities of held-out texts: for perplexity, and for which answer of a pair a model prefers.

Shapes: B rows, T tokens of a row, D model, V vocabulary, N tokens with weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab_utils.data.documents import Document, Encoding, encode_row
from lab_utils.data.packing import first_fit
from lab_utils.data.pairs import answer_document
from lab_utils.models.base import TrainableModel

BATCH_TOKENS = 8192  # tokens of one forward pass


@dataclass(frozen=True)
class Likelihood:
    """Of one document: Σ weight·log-probability in nat, and Σ weight."""

    logp: float
    tokens: float


@dataclass(frozen=True)
class PairLikelihood:
    """Of the two answers of a preference row, given its prompt."""

    chosen: Likelihood
    rejected: Likelihood


@torch.no_grad()
def document_likelihoods(
    model: TrainableModel,
    documents: Sequence[Document],
    *,
    row_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """Log-likelihood of each document, in the order given; no document is cut, and none sees another.

    Args:
        model: in whatever mode it is; on the device where its head is.
        documents: token ids and weights; the first token of each is never predicted.
        row_tokens: tokens of a packed row; a longer document makes rows longer.
        batch_tokens: tokens of one forward pass (at least one row).
        on_progress: called with the number of documents done.
    """
    found: list[Likelihood] = [Likelihood(0.0, 0.0)] * len(documents)
    # The longest first: rows of one batch are about as full, and memory runs out at once or not at all.
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i].input_ids))
    width = max([row_tokens, *(len(documents[i].input_ids) for i in order[:1])])
    rows = first_fit([len(documents[i].input_ids) for i in order], width)
    per_batch = max(1, batch_tokens // width)
    done = 0
    for start in range(0, len(rows), per_batch):
        batch = [[order[i] for i in row] for row in rows[start : start + per_batch]]
        for i, likelihood in _batch_likelihoods(model, documents, batch, width):
            found[i] = likelihood
        done += sum(map(len, batch))
        if on_progress:
            on_progress(done)
    return found


def _batch_likelihoods(
    model: TrainableModel, documents: Sequence[Document], batch: list[list[int]], T: int
) -> list[tuple[int, Likelihood]]:
    from kernels.registry import get

    B, device = len(batch), model.head_weight.device
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    positions_BT = torch.arange(T).repeat(B, 1)
    documents_BT = torch.full((B, T), -1)
    weights_BT = torch.zeros(B, T)
    for b, row in enumerate(batch):
        end = 0
        for d, i in enumerate(row):
            start, end = end, end + len(documents[i].input_ids)
            ids_BT[b, start:end] = torch.tensor(documents[i].input_ids)
            weights_BT[b, start:end] = torch.tensor(documents[i].loss_weights)
            weights_BT[b, start] = 0.0
            documents_BT[b, start:end] = d
            positions_BT[b, start:end] = torch.arange(end - start)
        positions_BT[b, end:] = torch.arange(T - end)
    hidden_BTD = model(ids_BT.to(device), positions_BT.to(device), documents_BT.to(device)).hidden_BTD
    keep_BT = weights_BT[:, 1:] != 0
    hidden_ND = hidden_BTD[:, :-1][keep_BT.to(device)]
    logprob_N: Tensor = torch.zeros(0)
    if len(hidden_ND):
        logprob = get("linear_logprob", hidden_ND.device.type, hidden_ND.dtype)
        logprob_N = logprob(hidden_ND, model.head_weight, ids_BT[:, 1:][keep_BT].to(device))[0].cpu()
    weights_N = weights_BT[:, 1:][keep_BT].double()
    # A slot a document: rows have at most T documents.
    slots_N = (torch.arange(B)[:, None] * T + documents_BT[:, 1:])[keep_BT]
    totals = torch.zeros(2, B * T, dtype=torch.float64)
    totals[0].index_add_(0, slots_N, weights_N * logprob_N.double())
    totals[1].index_add_(0, slots_N, weights_N)
    return [
        (i, Likelihood(float(totals[0, b * T + d]), float(totals[1, b * T + d])))
        for b, row in enumerate(batch)
        for d, i in enumerate(row)
    ]


# -- documents -----------------------------------------------------------------------------------------------


def text_likelihoods(
    model: TrainableModel,
    encoding: Encoding,
    rows: Sequence[dict[str, Any]],
    format: str,
    *,
    row_tokens: int,
    **options: Any,
) -> list[Likelihood]:
    """Log-likelihood of each row of format ``messages`` or ``text``, with the weights of training.

    Running text longer than a row is cut into pieces of a row, as in training, and its pieces are added up. A
    conversation is never cut. Options as for ``document_likelihoods``.
    """
    pieces, owners = [], []
    for number, row in enumerate(rows):
        document = encode_row(row, format, encoding)
        length = len(document.input_ids)
        step = row_tokens if format == "text" else length
        for start in range(0, length, step):
            part = slice(start, start + step)
            ids, weights = document.input_ids[part], document.loss_weights[part]
            pieces.append(Document(ids, [0.0, *weights[1:]], document.source))
            owners.append(number)
    totals = [[0.0, 0.0] for _ in rows]
    found = document_likelihoods(model, pieces, row_tokens=row_tokens, **options)
    for owner, likelihood in zip(owners, found):
        totals[owner][0] += likelihood.logp
        totals[owner][1] += likelihood.tokens
    return [Likelihood(*total) for total in totals]


def pair_likelihoods(
    model: TrainableModel,
    encoding: Encoding,
    rows: Sequence[dict[str, Any]],
    *,
    row_tokens: int,
    **options: Any,
) -> list[PairLikelihood]:
    """Log-likelihoods of both answers of each preference row given its prompt, end tokens included.

    Options as for ``document_likelihoods``.
    """
    flat = [
        answer_document(row["prompt"], row[side], row.get("tools"), encoding, f"pair {number}")
        for number, row in enumerate(rows, 1)
        for side in ("chosen", "rejected")
    ]
    found = document_likelihoods(model, flat, row_tokens=row_tokens, **options)
    return [PairLikelihood(*found[i : i + 2]) for i in range(0, len(found), 2)]
