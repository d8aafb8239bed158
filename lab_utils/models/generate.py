"""Greedy generation for evaluation: prompts of different lengths in one batch, each stopped at its end token."""

from __future__ import annotations

import torch
from torch import Tensor

from lab_utils.models.base import TrainableModel


@torch.no_grad()
def greedy_generate(
    model: TrainableModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    batch_tokens: int = 16384,
) -> list[list[int]]:
    """The most probable continuation of each prompt, in the order given, without the end token.

    Args:
        model: in whatever mode and device it is.
        prompts: token ids, none empty.
        max_new_tokens: most tokens to add to a prompt.
        eos_id: token that ends a continuation.
        batch_tokens: tokens of one forward pass, padding included.

    Raises:
        ValueError: an empty prompt.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("prompts: every prompt needs at least one token; drop the empty ones.")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    live = order
    for _ in range(max_new_tokens):
        still = []
        for batch in _batches(live, prompts, answers, batch_tokens):
            tokens = _next_tokens(model, [prompts[i] + answers[i] for i in batch])
            for i, token in zip(batch, tokens):
                if token != eos_id:
                    answers[i].append(token)
                    still.append(i)
        live = still
        if not live:
            break
    return answers


def _batches(live: list[int], prompts, answers, batch_tokens: int) -> list[list[int]]:
    """Prompts of similar length together, at most ``batch_tokens`` with padding (or one prompt)."""
    batches: list[list[int]] = []
    for i in live:
        width = len(prompts[i]) + len(answers[i])
        if batches and (len(batches[-1]) + 1) * max(width, longest) <= batch_tokens:
            batches[-1].append(i)
            longest = max(longest, width)
        else:
            batches.append([i])
            longest = width
    return batches


def _next_tokens(model: TrainableModel, sequences: list[list[int]]) -> list[int]:
    device, width = model.head_weight.device, max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    documents = torch.full_like(ids, -1)
    positions = torch.arange(width).repeat(len(sequences), 1)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        documents[row, : len(sequence)] = 0
        positions[row, len(sequence) :] -= len(sequence)
    hidden_BTD = model(ids.to(device), positions.to(device), documents.to(device)).hidden_BTD
    last = torch.tensor([len(s) - 1 for s in sequences], device=device)
    hidden_BD = hidden_BTD[torch.arange(len(sequences), device=device), last]
    return _best(hidden_BD, model.head_weight)


def _best(hidden_BD: Tensor, head_VD: Tensor) -> list[int]:
    return (hidden_BD.float() @ head_VD.float().T).argmax(-1).tolist()
