"""Answers of a model: prompts of different lengths together, each until its end token, greedy or sampled.

Every token is computed from the whole prefix, the prefixes packed in rows: right for any ``TrainableModel`` under data
and expert parallelism, at a cost that grows with the square of the length. There is no key-value cache yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lab_utils.models.base import TrainableModel
from lab_utils.models.sampling import Request, Sample, Sampling, draw, uniform

__all__ = ["Request", "Sample", "Sampling", "generate", "greedy_generate"]

ROW_TOKENS = 512  # a row holds several short prefixes
Lockstep = Callable[[bool, bool], tuple[bool, bool]]


def greedy_generate(
    model: TrainableModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    batch_tokens: int = 8192,
) -> list[list[int]]:
    """The most probable continuation of each prompt, in the order given, without the end token.

    Raises:
        ValueError: an empty prompt.
    """
    requests = [Request(prompt, i, max_new_tokens) for i, prompt in enumerate(prompts)]
    found = generate(
        model,
        requests,
        sampling=Sampling(0.0),
        eos_id=eos_id,
        slots=max(len(prompts), 1),
        batch_tokens=batch_tokens,
    )
    return [sample.tokens[:-1] if sample.finished else sample.tokens for sample in found]


@torch.no_grad()
def generate(
    model: TrainableModel,
    requests: Sequence[Request],
    *,
    sampling: Sampling,
    eos_id: int,
    slots: int = 64,
    want_routing: bool = False,
    on_tokens: Callable[[list[tuple[int, int, float]]], None] | None = None,
    lockstep: Lockstep | None = None,
    batch_tokens: int = 8192,
) -> list[Sample]:
    """The answer to each request, in order.

    Args:
        model: in whatever mode and device it is.
        requests: what is wanted; what is ``done`` of one already stays, and nothing is sampled for one that is whole.
        eos_id: token that ends an answer.
        slots: answers sampled at a time; the next request takes the place of one that ends.
        want_routing: samples carry the experts that were chosen (mixtures of experts alone).
        on_tokens: told of the tokens of a step, (key, token, log-probability) each, before the next step.
        lockstep: for ranks that share experts, whose forward passes are collectives: takes whether this rank has a pass
            to run and whether it has answers to sample, returns the same over all of them. A rank with nothing to do
            runs one token.
        batch_tokens: tokens of one forward pass.

    Raises:
        ValueError: an empty prompt.
    """
    if any(not request.prompt for request in requests):
        raise ValueError("prompts: every prompt needs at least one token; drop the empty ones.")
    samples = [_begun(request, eos_id) for request in requests]
    waiting = [i for i, request in enumerate(requests) if not _whole(samples[i], request)][::-1]
    live: list[int] = []
    while True:
        while waiting and len(live) < slots:
            live.append(waiting.pop())
        if not _any(lockstep, bool(live)):
            break
        told = []
        texts = {i: requests[i].prompt + samples[i].tokens for i in live}
        batches = _batches(live, {i: len(text) for i, text in texts.items()}, batch_tokens)
        while _any(lockstep, bool(batches)):
            if not batches:
                _last_logits(model, [[eos_id]], False)
                continue
            batch = batches.pop(0)
            logits_RV, routes = _last_logits(model, [texts[i] for i in batch], want_routing)
            noise = [uniform(sampling.seed, requests[i].key, len(samples[i].tokens)) for i in batch]
            tokens, logps, kept = draw(logits_RV, sampling, noise)
            for row, i in enumerate(batch):
                _extend(samples[i], tokens[row], logps[row], tokens[row] == eos_id)
                if routes is not None:
                    samples[i].routing = routes[row]
                if kept is not None:
                    samples[i].kept.append(kept[row])
                told.append((requests[i].key, tokens[row], logps[row]))
        if on_tokens is not None and told:
            on_tokens(told)
        live = [i for i in live if not _whole(samples[i], requests[i])]
    _complete(model, requests, samples, sampling, want_routing, lockstep)
    return samples


def _begun(request: Request, eos_id: int) -> Sample:
    done = list(request.done)
    return Sample(done, list(request.done_logprobs), bool(done) and done[-1] == eos_id, kept=[])


def _whole(sample: Sample, request: Request) -> bool:
    return sample.finished or len(sample.tokens) >= request.max_new_tokens


def _extend(sample: Sample, token: int, logp: float, ends: bool) -> None:
    sample.tokens.append(token)
    sample.logprobs.append(logp)
    sample.finished = ends


def _complete(
    model: TrainableModel,
    requests: Sequence[Request],
    samples: list[Sample],
    sampling: Sampling,
    want_routing: bool,
    lockstep: Lockstep | None,
) -> None:
    """What a log doesn't hold of tokens sampled earlier: their routing, and the ids that were kept."""
    for sample in samples:
        if not sampling.cuts:
            sample.kept = None
    missing = [
        i
        for i, (request, sample) in enumerate(zip(requests, samples, strict=True))
        if sample.tokens
        and (
            (want_routing and sample.routing is None)
            or (sampling.cuts and len(sample.kept) < len(sample.tokens))
        )
    ]
    while _any(lockstep, bool(missing)):
        if not missing:
            _all_logits(model, [0], False)
            continue
        i = missing.pop()
        request, sample = requests[i], samples[i]
        logits_TV, routing = _all_logits(model, request.prompt + sample.tokens[:-1], want_routing)
        sample.routing = routing
        if sampling.cuts:
            drawn_RV = logits_TV[len(request.prompt) - 1 :]
            sample.kept = draw(drawn_RV, sampling, [0.0] * len(drawn_RV))[2]


def _any(lockstep: Lockstep | None, own: bool) -> bool:
    return own if lockstep is None else lockstep(own, own)[0]


def _batches(live: list[int], lengths: dict[int, int], batch_tokens: int) -> list[list[int]]:
    """Answers in their order, as many together as ``batch_tokens`` holds (or one)."""
    batches: list[list[int]] = []
    room = 0
    for i in live:
        if lengths[i] > room:
            batches.append([])
            room = max(batch_tokens, lengths[i])
        batches[-1].append(i)
        room -= lengths[i]
    return batches


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


def _all_logits(model: TrainableModel, text: list[int], want_routing: bool) -> tuple[Tensor, Tensor | None]:
    """fp32 logits ``[T, V]`` behind every token of one text, and the routing of its tokens."""
    device = model.head_weight.device
    ids = torch.tensor([text], device=device)
    positions = torch.arange(len(text), device=device)[None]
    with model.record_routing() if want_routing else nullcontext() as record:
        hidden_BTD = model(ids, positions, torch.zeros_like(ids)).hidden_BTD
    routing = record.to_rows(1)[0].cpu() if want_routing else None
    return hidden_BTD[0].float() @ model.head_weight.float().T, routing
