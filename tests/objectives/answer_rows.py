"""Random sampled answers, packed into rows any way one likes, with hidden states that belong to the documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lab_utils.data.rows import PackedRows

T, D, E, V, S = 30, 6, 5, 17, 9  # T: of a row; E: width of a teacher; S: most tokens that a sampler keeps
SIDE_OF_TEACHERS = ("teacher", "teacher_weight", "teacher_hidden")


@dataclass
class Doc:
    """A prompt and its answer, n tokens: hidden states (a leaf), and what side tensors say of each token."""

    ids: torch.Tensor
    bears: torch.Tensor
    hidden: torch.Tensor
    advantage: float
    side: dict[str, torch.Tensor]

    @property
    def at(self) -> torch.Tensor:
        """Places of the tokens with loss."""
        return self.bears.nonzero().flatten()


def make_doc(g: torch.Generator, drift: float = 0.6, advantage: float | None = None) -> Doc:
    """``drift``: how far, in nat, old policy, sampler and reference are from each other."""
    prompt, answer = (int(torch.randint(1, 6, (), generator=g)) for _ in range(2))
    n = prompt + answer
    bears = torch.arange(n) >= prompt
    bears &= (torch.rand(n, generator=g) < 0.8) | (torch.arange(n) == n - 1)  # tools speak in between
    ids = torch.randint(0, V, (n,), generator=g)
    kept = torch.full((n, S), -1, dtype=torch.int32)
    for t in range(n):  # the token itself and some others, in any order
        others = [i for i in torch.randperm(V, generator=g).tolist() if i != int(ids[t])]
        some = [int(ids[t]), *others[: int(torch.randint(0, S, (), generator=g))]]
        order = torch.randperm(len(some), generator=g)
        kept[t, : len(some)] = torch.tensor(some, dtype=torch.int32)[order]
    noise = {
        name: -3 + drift * torch.randn(n, generator=g)
        for name in ("old_logps", "sampler_logps", "reference_logps")
    }
    value = float(torch.randn((), generator=g)) if advantage is None else advantage
    teacher = {
        "teacher": torch.full((n,), int(torch.randint(0, 3, (), generator=g)), dtype=torch.int16),
        "teacher_weight": torch.full((n,), float(torch.rand((), generator=g)) + 0.5),
        "teacher_hidden": torch.randn(n, E, generator=g),
        "teacher_logps": -3 + torch.randn(n, generator=g),
    }
    hidden = torch.randn(n, D, generator=g).requires_grad_()
    return Doc(ids, bears, hidden, value, {**noise, "kept": kept, **teacher})


def make_docs(
    seed: int, count: int, temperature: float = 1.0, masked: bool = False, **options
) -> tuple[list[Doc], torch.Tensor]:
    """Documents, and a head. The other policies are near the one that the hidden states stand for."""
    g = torch.Generator().manual_seed(seed)
    docs = [make_doc(g, **options) for _ in range(count)]
    head = torch.randn(V, D, generator=g).requires_grad_()
    for doc in docs:
        own = log_probs(doc, head, temperature, masked).detach().float()
        for name in ("old_logps", "sampler_logps", "reference_logps"):
            doc.side[name][doc.at] += 3 + own
    return docs, head


def spread(docs: list[Doc], rows: int) -> list[list[Doc]]:
    """Documents dealt out over rows; the last row gets none."""
    return [docs[b :: rows - 1] for b in range(rows - 1)] + [[]]


def pack(layout: list[list[Doc]], names: tuple[str, ...]) -> tuple[torch.Tensor, PackedRows]:
    """Hidden states and rows, with the side tensors ``names``: ``layout[b]`` are the documents of row b.

    Prompts and padding are filled with what must not be read.
    """
    B = len(layout)
    ids, positions = torch.full((B, T), 3), torch.arange(T).repeat(B, 1)
    documents, weights = torch.full((B, T), -1), torch.zeros(B, T)
    shapes = {"kept": (S,), "teacher_hidden": (E,)}
    kinds = {"kept": torch.int32, "teacher": torch.int16}
    side = {
        name: torch.full((B, T, *shapes.get(name, ())), 7, dtype=kinds.get(name, torch.float32))
        for name in names
    }
    lines = []
    for b, docs in enumerate(layout):
        at = 0
        for number, doc in enumerate(docs):
            n = len(doc.ids)
            part, at = slice(at, at + n), at + n
            ids[b, part], positions[b, part], documents[b, part] = doc.ids, torch.arange(n), number
            weights[b, part] = doc.bears.float()
            for name in names:
                side[name][b, part] = doc.advantage if name == "advantages" else doc.side[name]
        assert at <= T
        fill = torch.full((T - at, D), 100.0, requires_grad=True)
        lines.append(torch.cat([*(doc.hidden for doc in docs), fill]))
    return torch.stack(lines), PackedRows(ids, positions, documents, weights, side)


def leaves(docs: list[Doc], head: torch.Tensor) -> list[torch.Tensor]:
    return [head, *(doc.hidden for doc in docs)]


def distributions(
    doc: Doc, head: torch.Tensor, temperature: float = 1.0, masked: bool = False
) -> torch.Tensor:
    """log π of every token of the vocabulary at each place with loss, fp64; ``masked``: over the kept ones alone."""
    logits = doc.hidden.double()[doc.at - 1] @ head.double().T / temperature
    if masked:
        shut = torch.ones_like(logits, dtype=torch.bool)
        for line, kept in zip(shut, doc.side["kept"][doc.at].long(), strict=True):
            line[kept[kept >= 0]] = False
        logits = logits.masked_fill(shut, -torch.inf)
    return logits.log_softmax(-1)


def log_probs(doc: Doc, head: torch.Tensor, temperature: float = 1.0, masked: bool = False) -> torch.Tensor:
    """log π of the document's own tokens with loss."""
    return distributions(doc, head, temperature, masked)[torch.arange(len(doc.at)), doc.ids[doc.at]]
