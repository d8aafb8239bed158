"""Sampling with the trained model itself: ``models.generate`` behind the write-ahead log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.rollouts._base import LoggedSampler, Message, noise_key
from lab_utils.rollouts.prompts import prompt_ids
from lab_utils.rollouts.rewards import Answer

if TYPE_CHECKING:
    from lab_utils.data.documents import Encoding
    from lab_utils.models.generate import Request, Sample, Sampling


class InProcess(LoggedSampler):
    """Answers of a model in this process.

    Args:
        model: a TrainableModel; the caller puts it into evaluation mode.
        encoding: tokenizer and texts of the chat format, for ``ask``.
        folder: of the logs.
        rank: of this process among those that sample.
        slots: answers sampled at a time.
        want_routing: samples carry the experts that were chosen.
        lockstep: see ``generate``: how ranks that share experts take steps together.
        share: for the stages of a pipeline, which sample together: makes the first one's value everybody's.
        logs: whether this process keeps the log; of the stages of a pipeline, the first does.
        ask_mode: reasoning mode of ``ask``: chat, thinking or max.
        ask_tokens: longest reply of ``ask``, reasoning included.
        ask_seed: seed of its sampling, at temperature 1.
        generate: for tests; absent: ``models.generate.generate``.
    """

    together = True

    def __init__(
        self,
        model: Any,
        encoding: Encoding,
        folder: str | Path,
        *,
        rank: int = 0,
        slots: int = 64,
        want_routing: bool = False,
        lockstep: Any = None,
        share: Callable[[Any], Any] = lambda value: value,
        logs: bool = True,
        ask_mode: str = "chat",
        ask_tokens: int = 512,
        ask_seed: int = 0,
        generate: Callable[..., list[Sample]] | None = None,
    ) -> None:
        super().__init__(folder, rank)
        self.model, self.encoding = model, encoding
        self.slots, self.want_routing, self.lockstep = slots, want_routing, lockstep
        self._share, self._logs = share, logs
        self.ask_mode, self.ask_tokens, self.ask_seed = ask_mode, ask_tokens, ask_seed
        self._generator = generate

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """The answer to each request; tokens of the log are taken from there, the others are logged as they come.

        Raises:
            RunError, DataError, CheckpointError: see ``LoggedSampler.resumed``.
        """
        resumed = self._share(self.resumed(requests, sampling) if self._logs else None)
        samples = self._generate(
            resumed, sampling, self.want_routing, self.log.append if self._logs else None
        )
        if self._logs:
            self.completed(resumed, samples)
        return samples

    def ask(self, prompts: Sequence[Sequence[Message]]) -> list[str]:
        """A reply to each conversation by the model as it stands, without its reasoning."""
        from lab_utils.models.generate import Request, Sampling

        encoded = [prompt_ids(self.encoding, {"messages": list(p)}, self.ask_mode) for p in prompts]
        requests = [Request(ids, noise_key("ask", i, ids), self.ask_tokens) for i, ids in enumerate(encoded)]
        sampling = Sampling(1.0, 1.0, 0, self.ask_seed)
        samples = self._generate(requests, sampling, False, None)
        return [Answer.of(sample, self.ask_mode, self.encoding.tokenizer).text for sample in samples]

    def _generate(
        self, requests: list[Request], sampling: Sampling, want_routing: bool, on_tokens: Any
    ) -> list[Sample]:
        generate = self._generator
        if generate is None:
            from lab_utils.models.generate import generate
        return generate(
            self.model,
            requests,
            sampling=sampling,
            eos_id=self.encoding.tokenizer.eos_id,
            slots=self.slots,
            want_routing=want_routing,
            on_tokens=on_tokens,
            lockstep=self.lockstep,
        )
