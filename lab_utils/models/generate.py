"""Answers of a model: prompts of different lengths together, each until its end token, greedy or sampled.

Answers are gone on with in rows (``decoding``): as one ends, the next request takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lab_utils.models.base import TrainableModel
from lab_utils.models.decoding import Decoded, Decoding, start_decoding
from lab_utils.models.sampling import Request, Sample, Sampling, draw, uniform

__all__ = ["Request", "Sample", "Sampling", "generate", "greedy_generate"]

SLOTS = 128  # answers gone on with at a time, where nobody says how many
Lockstep = Callable[[bool, bool], tuple[bool, bool]]


def greedy_generate(
    model: TrainableModel, prompts: list[list[int]], *, max_new_tokens: int, eos_id: int
) -> list[list[int]]:
    """The most probable continuation of each prompt, in the order given, without the end token.

    Raises:
        ValueError: an empty prompt.
    """
    requests = [Request(prompt, i, max_new_tokens) for i, prompt in enumerate(prompts)]
    found = generate(model, requests, sampling=Sampling(0.0), eos_id=eos_id, slots=SLOTS)
    return [sample.tokens[:-1] if sample.finished else sample.tokens for sample in found]


@torch.no_grad()
def generate(
    model: TrainableModel,
    requests: Sequence[Request],
    *,
    sampling: Sampling,
    eos_id: int,
    slots: int = SLOTS,
    want_routing: bool = False,
    on_tokens: Callable[[list[tuple[int, int, float]]], None] | None = None,
    lockstep: Lockstep | None = None,
    decoding: Decoding | None = None,
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
        decoding: how the model goes on with texts; absent: its own way (``start_decoding``).

    Raises:
        ValueError: an empty prompt.
    """
    if any(not request.prompt for request in requests):
        raise ValueError("prompts: every prompt needs at least one token; drop the empty ones.")
    decoding = start_decoding(model) if decoding is None else decoding
    # A log has neither the routing of tokens sampled earlier nor the ids that were kept: feeding them again finds both.
    fed_again = want_routing or sampling.cuts
    samples = [_begun(request, eos_id, fed_again) for request in requests]
    waiting = [i for i, request in enumerate(requests) if not _whole(samples[i], request)][::-1]
    routes: list[list[Tensor]] = [[] for _ in requests]
    live: list[int] = []  # the request of each row
    while _any(lockstep, bool(live or waiting)):
        told: list[tuple[int, int, float]] = []

        def take(numbers: list[int], found: Decoded, told: list = told) -> None:
            noise = []
            if sampling.temperature:
                noise = [uniform(sampling.seed, requests[i].key, len(samples[i].tokens)) for i in numbers]
            tokens, logps, kept = draw(found.logits_RV, sampling, noise)
            for row, i in enumerate(numbers):
                done, at = requests[i].done, len(samples[i].tokens)
                again = at < len(done)
                token, logp = (
                    (done[at], requests[i].done_logprobs[at]) if again else (tokens[row], logps[row])
                )
                _extend(samples[i], token, logp, token == eos_id)
                if found.routing is not None:
                    routes[i].append(found.routing[row])
                if kept is not None:
                    samples[i].kept.append(kept[row])
                if not again:
                    told.append((requests[i].key, token, logp))

        going_on = list(live)
        if going_on:
            last = [samples[i].tokens[-1] for i in going_on]
        came = [waiting.pop() for _ in range(min(slots - len(live), len(waiting)))]
        texts = [requests[i].prompt + samples[i].tokens for i in came]
        passes = decoding.batches(texts) if texts else []
        # One pass goes on with every answer that is there, others begin those that have come.
        while _any(lockstep, bool(going_on or passes)):
            if going_on:
                take(going_on, decoding.step(last, want_routing=want_routing))
                going_on = []
            elif passes:
                some = passes.pop(0)
                live += [came[at] for at in some]
                found = decoding.prefill([texts[at] for at in some], want_routing=want_routing)
                take([came[at] for at in some], found)
            else:
                decoding.idle()
        if on_tokens is not None and told:
            on_tokens(told)
        for row in reversed(range(len(live))):
            if _whole(samples[live[row]], requests[live[row]]):
                decoding.drop(row)
                end = live.pop()
                if row < len(live):
                    live[row] = end
    for sample, parts in zip(samples, routes, strict=True):
        sample.routing = torch.cat(parts) if parts else None
        sample.kept = sample.kept if sampling.cuts else None
    return samples


def _begun(request: Request, eos_id: int, fed_again: bool) -> Sample:
    done = [] if fed_again else list(request.done)
    return Sample(done, list(request.done_logprobs[: len(done)]), bool(done) and done[-1] == eos_id, kept=[])


def _whole(sample: Sample, request: Request) -> bool:
    return sample.finished or len(sample.tokens) >= request.max_new_tokens


def _extend(sample: Sample, token: int, logp: float, ends: bool) -> None:
    sample.tokens.append(token)
    sample.logprobs.append(logp)
    sample.finished = ends


def _any(lockstep: Lockstep | None, own: bool) -> bool:
    return own if lockstep is None else lockstep(own, own)[0]
