"""Random pairs of answers, packed into rows any way one likes, with hidden states that belong to the documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lab_utils.data.rows import PackedRows

T, D, V = 40, 6, 17  # T: of a row, enough for three documents


@dataclass
class Doc:
    """One document: tokens, whether each bears loss, hidden states (a leaf), the reference's log-probabilities."""

    ids: torch.Tensor
    bears: torch.Tensor
    hidden: torch.Tensor
    reference: torch.Tensor


def make_doc(generator: torch.Generator, scale: float = 1.0) -> Doc:
    prompt, answer = (int(torch.randint(1, 6, (), generator=generator)) for _ in range(2))
    n = prompt + answer
    bears = torch.arange(n) >= prompt
    bears &= (torch.rand(n, generator=generator) < 0.8) | (torch.arange(n) == n - 1)  # tools speak in between
    reference = -3 * torch.rand(n, generator=generator) * bears
    hidden = (scale * torch.randn(n, D, generator=generator)).requires_grad_()
    return Doc(torch.randint(0, V, (n,), generator=generator), bears, hidden, reference)


def make_pairs(seed: int, count: int, size: int = 2) -> tuple[list[list[Doc]], torch.Tensor]:
    """``count`` pairs of ``size`` documents, and a head."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [[make_doc(generator) for _ in range(size)] for _ in range(count)]
    return pairs, torch.randn(V, D, generator=generator).requires_grad_()


def pack(layout: list[list[list[Doc]]], z0: float | None = None) -> tuple[torch.Tensor, PackedRows]:
    """Hidden states and rows of pairs: ``layout[b]`` are those of row b; an empty one is padding alone.

    Padding is filled with what must not be read.
    """
    B = len(layout)
    ids, positions = torch.full((B, T), 3), torch.arange(T).repeat(B, 1)
    documents, weights = torch.full((B, T), -1), torch.zeros(B, T)
    role, reference = torch.zeros(B, T, dtype=torch.int8), torch.full((B, T), 7.0)
    lines = []
    for b, pairs in enumerate(layout):
        at, parts = 0, []
        for number, (doc, its_role) in enumerate((d, r) for pair in pairs for r, d in enumerate(pair)):
            part = slice(at, at := at + len(doc.ids))
            ids[b, part], positions[b, part], documents[b, part] = doc.ids, torch.arange(len(doc.ids)), number
            weights[b, part], role[b, part] = doc.bears.float(), its_role
            reference[b, part] = doc.reference + 5.0 * ~doc.bears
            parts.append(doc.hidden)
        assert at <= T
        lines.append(torch.cat([*parts, torch.full((T - at, D), 100.0, requires_grad=True)]))
    side = {"role": role, "reference_logps": reference}
    if z0 is not None:
        side["z0"] = torch.full((B, 1), z0)
    return torch.stack(lines), PackedRows(ids, positions, documents, weights, side)


def leaves(pairs: list[list[Doc]], head: torch.Tensor) -> list[torch.Tensor]:
    return [head, *(doc.hidden for pair in pairs for doc in pair)]


def token_values(doc: Doc, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a document's tokens with loss: log-probability, whether it is the likeliest, entropy; in fp64."""
    at = doc.bears.nonzero().flatten()
    log_p = torch.log_softmax(doc.hidden.double()[at - 1] @ head.double().T, -1)
    return (
        log_p[torch.arange(len(at)), doc.ids[at]],
        log_p.argmax(-1) == doc.ids[at],
        -(log_p.exp() * log_p).sum(-1),
    )


def log_prob(doc: Doc, head: torch.Tensor) -> torch.Tensor:
    return token_values(doc, head)[0].sum()
