"""What a sampler is, and what every sampler does with the write-ahead log."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lab_utils.errors import RunError
from lab_utils.rollouts.log import RoundLogs, TokenLog

if TYPE_CHECKING:
    from lab_utils.models.generate import Request, Sample, Sampling

Message = dict[str, Any]
UNKNOWN = float("nan")


class Sampler(Protocol):
    """Where answers come from."""

    def begin(self, round: int) -> None:
        """Open the round; what was sampled of it before a kill is known from here on."""
        ...

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """The answer to each request, in order; every rank calls it equally often, with or without requests."""
        ...

    def ask(self, prompts: Sequence[Sequence[Message]]) -> list[str]:
        """A reply to each conversation, for a judge; not logged. Every rank calls it equally often."""
        ...

    def end(self) -> None:
        """Close the round; its log is on the disk."""
        ...

    def forget_before(self, round: int) -> None:
        """Remove logs of rounds that no checkpoint can go back to."""
        ...


class LoggedSampler:
    """Rounds with their logs; subclasses do the sampling.

    Args:
        folder: of the logs.
        rank: of this process among those that sample.

    Attributes:
        together: whether all stages of a pipeline have to ask, instead of the first one.
    """

    together = False

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.logs = RoundLogs(folder, rank)
        self.log: TokenLog | None = None
        self._round: int | None = None

    def begin(self, round: int) -> None:
        self.end()
        self._round = round

    def end(self) -> None:
        if self.log is not None:
            self.log.close()
            self.log = None

    def forget_before(self, round: int) -> None:
        self.logs.forget_before(round)

    def resumed(self, requests: Sequence[Request], sampling: Sampling) -> list[Request]:
        """The requests with what the log holds of their answers as ``done``; their prompts are announced to it.

        Raises:
            RunError: no round was begun, or two requests have one key.
            DataError, CheckpointError: see ``TokenLog``.
        """
        if self._round is None:
            raise RunError("A sampler was asked for answers before a round began: call begin(round) first.")
        prompts = {request.key: request.prompt for request in requests}
        if len(prompts) < len(requests):
            raise RunError("Two requests of a round have one key: give each answer its own.")
        if self.log is None:
            self.log = self.logs.open(self._round, context=repr(sorted(asdict(sampling).items())))
        self.log.announce(prompts)
        known = self.log.answers
        return [
            replace(r, done=list(known[r.key].tokens), done_logprobs=list(known[r.key].logprobs))
            for r in requests
        ]

    def completed(self, requests: Sequence[Request], samples: Sequence[Sample]) -> None:
        """Mark these answers as complete; those that the log has as complete stay as they are."""
        fresh = [
            (request.key, sample.finished, UNKNOWN)
            for request, sample in zip(requests, samples, strict=True)
            if not self.log.answers[request.key].final
        ]
        self.log.complete(fresh)


def noise_key(*parts: Any) -> int:
    """A key in [0, 2^62) that depends on ``parts`` alone, by their ``repr``."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 2
