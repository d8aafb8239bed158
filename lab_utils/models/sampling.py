"""Requests for answers, how tokens are drawn, and what comes back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: ``temperature`` 0 takes the likeliest; ``top_p`` and ``top_k`` (0: all) cut the tail."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    @property
    def cuts(self) -> bool:
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


@dataclass
class Request:
    """An answer that is wanted.

    Attributes:
        prompt: token ids, at least one.
        key: names the answer's noise: the same key and seed draw the same uniforms, whatever else is sampled.
        max_new_tokens: longest answer.
        done, done_logprobs: of its tokens those that were sampled earlier; sampling goes on behind them.
    """

    prompt: list[int]
    key: int
    max_new_tokens: int
    done: list[int] = field(default_factory=list)
    done_logprobs: list[float] = field(default_factory=list)


@dataclass
class Sample:
    """An answer.

    Attributes:
        tokens: the end token included, where it ended.
        logprobs: of each token, under the distribution that it was drawn from.
        finished: it ended by the end token.
        routing: int16 [prompt + tokens - 1, L, k], the experts of every token fed, in all MoE layers; where wanted.
        kept: ids that each token was drawn from, under top-p or top-k.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool
    routing: Tensor | None = None
    kept: list[Tensor] | None = None


def uniform(seed: int, key: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: 53 bits of a hash."""
    words = hashlib.blake2b(repr((seed, key, position)).encode(), digest_size=8).digest()
    return (int.from_bytes(words, "little") >> 11) * 2.0**-53


def draw(
    logits_RV: Tensor, sampling: Sampling, uniforms: list[float]
) -> tuple[list[int], list[float], list[Tensor] | None]:
    """A token of each row, its log-probability, and the ids that were kept.

    Args:
        logits_RV: fp32.
        uniforms: one a row; the token is where the cumulated probabilities, by id, pass it.
    """
    if sampling.temperature == 0:
        highest_R, best = logits_RV.max(-1)
        logps = highest_R - logits_RV.logsumexp(-1)
        return best.tolist(), logps.tolist(), None
    logits_RV = logits_RV / sampling.temperature
    if sampling.cuts:
        logits_RV = logits_RV.masked_fill(~_kept(logits_RV, sampling), -torch.inf)
    logps_RV = logits_RV.log_softmax(-1)
    mass_RV = logps_RV.double().exp().cumsum(-1)
    at_R1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device)[:, None] * mass_RV[:, -1:]
    token_R1 = torch.searchsorted(mass_RV, at_R1, right=True)
    # Rounding may point behind the last token that can be drawn.
    last_R1 = torch.where(logps_RV > -torch.inf, torch.arange(logps_RV.shape[1], device=logps_RV.device), -1)
    token_R1 = token_R1.minimum(last_R1.amax(1, keepdim=True))
    kept = [row.nonzero().flatten().cpu() for row in logps_RV > -torch.inf] if sampling.cuts else None
    return token_R1[:, 0].tolist(), logps_RV.gather(1, token_R1)[:, 0].tolist(), kept


def _kept(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """Which tokens stay: the ``top_k`` likeliest, and of them the fewest whose mass reaches ``top_p``."""
    sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    stays = torch.ones_like(sorted_RV, dtype=torch.bool)
    if sampling.top_k:
        stays[:, sampling.top_k :] = False
    if sampling.top_p < 1:
        p_RV = sorted_RV.masked_fill(~stays, -torch.inf).softmax(-1)
        stays &= p_RV.cumsum(-1) - p_RV < sampling.top_p
    return torch.zeros_like(stays).scatter_(1, order_RV, stays)
