"""Sampled answers to packed rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from lab_utils.data.packing import first_fit
from lab_utils.data.rows import PackedRows


@dataclass
class Text:
    """A prompt and its answer.

    Attributes:
        ids: of both.
        prompt: so many of them are the prompt; loss is on the rest.
        side: further values by name: one number, or an array of which the first dimension runs over ``ids``.
        kind: texts of different kinds share no row.
    """

    ids: list[int]
    prompt: int
    side: dict[str, float | np.ndarray] = field(default_factory=dict)
    kind: int = 0


def pack(
    texts: list[Text],
    row_tokens: int,
    *,
    pad_id: int,
    fill: dict[str, float] | None = None,
    names: tuple[str, ...] = (),
) -> PackedRows:
    """Rows ``[B, T]`` of these texts, whole, kinds one after the other; at least one row.

    Args:
        names: side tensors of one number a token that are there even if no text is.
        fill: value of each side tensor where there is no text; what is not named has 0.
    """
    layout: list[list[int]] = []
    for kind in sorted({text.kind for text in texts}):
        chosen = [i for i, text in enumerate(texts) if text.kind == kind]
        layout += [
            [chosen[i] for i in row] for row in first_fit([len(texts[i].ids) for i in chosen], row_tokens)
        ]
    layout = layout or [[]]
    B, T = len(layout), row_tokens
    ids = np.full((B, T), pad_id, np.int64)
    positions = np.tile(np.arange(T), (B, 1))
    documents, weights = np.full((B, T), -1, np.int64), np.zeros((B, T), np.float32)
    side = {name: np.zeros((B, T), np.float32) for name in names} | _side(texts, B, T, fill or {})
    for b, row in enumerate(layout):
        at = 0
        for number, i in enumerate(row):
            text = texts[i]
            n = len(text.ids)
            part = slice(at, at + n)
            ids[b, part], positions[b, part], documents[b, part] = text.ids, np.arange(n), number
            weights[b, at + text.prompt : at + n] = 1.0
            for name, value in text.side.items():
                if isinstance(value, np.ndarray) and value.ndim > 1:
                    side[name][b, part, ..., : value.shape[-1]] = value
                else:
                    side[name][b, part] = value
            at += n
        positions[b, at:] = np.arange(T - at)
    tensors = map(torch.from_numpy, (ids, positions, documents, weights))
    return PackedRows(*tensors, side={name: torch.from_numpy(values) for name, values in side.items()})


def _side(texts: list[Text], B: int, T: int, fill: dict[str, float]) -> dict[str, np.ndarray]:
    """Empty side tensors; the last dimension of one is the widest that any text has."""
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for text in texts:
        for name, value in text.side.items():
            if isinstance(value, np.ndarray):
                tail, dtype = value.shape[1:], value.dtype
            else:
                tail, dtype = (), np.dtype(np.float32)
            old = shapes.get(name, (tail, dtype))[0]
            if tail:
                tail = (*tail[:-1], max(tail[-1], old[-1]))
            shapes[name] = (tail, dtype)
    return {name: np.full((B, T, *tail), fill.get(name, 0), dtype) for name, (tail, dtype) in shapes.items()}
