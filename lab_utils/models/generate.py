"""Greedy generation for evaluation: prompts of different lengths in one batch, each stopped at its end token."""

from __future__ import annotations

import torch
from torch import Tensor

from lab_utils.models.base import TrainableModel

ROW_TOKENS = 512  # a row holds several short prompts


@torch.no_grad()
def greedy_generate(
    model: TrainableModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    batch_tokens: int = 8192,
) -> list[list[int]]:
    """The most probable continuation of each prompt, in the order given, without the end token.

    Args:
        model: in whatever mode and device it is.
        prompts: token ids, none empty.
        max_new_tokens: most tokens to add to a prompt.
        eos_id: token that ends a continuation.
        batch_tokens: tokens of one forward pass.

    Raises:
        ValueError: an empty prompt.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("prompts: every prompt needs at least one token; drop the empty ones.")
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        still = []
        for batch in _batches(live, [len(p) + len(a) for p, a in zip(prompts, answers)], batch_tokens):
            tokens = _next_tokens(model, [prompts[i] + answers[i] for i in batch])
            for i, token in zip(batch, tokens):
                if token != eos_id:
                    answers[i].append(token)
                    still.append(i)
        live = still
        if not live:
            break
    return answers


def _batches(live: list[int], lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Prompts in their order, as many together as ``batch_tokens`` holds (or one prompt)."""
    batches: list[list[int]] = []
    room = 0
    for i in live:
        if lengths[i] > room:
            batches.append([])
            room = max(batch_tokens, lengths[i])
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def _next_tokens(model: TrainableModel, sequences: list[list[int]]) -> list[int]:
    """The most probable next token of each: the sequences lie packed in rows, where none sees another."""
    device = model.head_weight.device
    width = max(ROW_TOKENS, *(len(s) for s in sequences))
    places: list[tuple[int, int]] = []  # row and first token of each sequence
    row, filled = 0, 0
    for sequence in sequences:
        if filled + len(sequence) > width:
            row, filled = row + 1, 0
        places.append((row, filled))
        filled += len(sequence)
    ids = torch.zeros(row + 1, width, dtype=torch.long)
    documents = torch.full_like(ids, -1)
    positions = torch.arange(width).repeat(row + 1, 1)
    for number, (sequence, (r, start)) in enumerate(zip(sequences, places)):
        end = start + len(sequence)
        ids[r, start:end] = torch.tensor(sequence)
        documents[r, start:end] = number
        positions[r, start:end] = torch.arange(len(sequence))
        positions[r, end:] = torch.arange(width - end)  # padding, until another sequence takes the place
    hidden_BTD = model(ids.to(device), positions.to(device), documents.to(device)).hidden_BTD
    at_row = torch.tensor([r for r, _ in places], device=device)
    last = torch.tensor([start + len(s) - 1 for s, (_, start) in zip(sequences, places)], device=device)
    return _best(hidden_BTD[at_row, last], model.head_weight)


def _best(hidden_BD: Tensor, head_VD: Tensor) -> list[int]:
    return (hidden_BD.float() @ head_VD.float().T).argmax(-1).tolist()
