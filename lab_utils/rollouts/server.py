"""Sampling from an OpenAI-compatible server: vLLM, vLLM-Ascend, SGLang, ``transformers serve``.

Answers come from ``POST /v1/completions``. How a server is spoken to is found out with the first request, best first:

* ``tokens``: the prompt as token ids, tokens and log-probabilities back (vLLM, SGLang). The ids are the model's own.
* ``generation_config``: text both ways, sampling set through that field (``transformers serve``, which would decode
  greedily otherwise). Its text leaves special tokens out, so reasoning can't be told from the answer: mode chat only.
* ``text``: text both ways.

Text is encoded again, so tokens can differ from those sampled: ``Server.retokenised`` counts answers where they do. A
server's log-probabilities are those of its own settings: vLLM gives them at the sampling temperature with
``--logprobs-mode processed_logprobs``. Connections never go through a proxy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lab_utils.data.tokenizer import END_THINK, THINK
from lab_utils.errors import RecipeError, RunError
from lab_utils.rollouts._base import UNKNOWN, LoggedSampler, Message, noise_key
from lab_utils.rollouts._http import Line, Refused
from lab_utils.rollouts.prompts import prompt_ids
from lab_utils.rollouts.rewards import Answer

if TYPE_CHECKING:
    from lab_utils.data.documents import Encoding
    from lab_utils.models.generate import Request, Sample, Sampling

DIALECTS = ("tokens", "generation_config", "text")


class Server(LoggedSampler):
    """Answers of a server.

    Args:
        url: ``http://HOST:PORT/v1``.
        encoding: tokenizer and texts of the chat format; the tokenizer is the model's.
        folder: of the logs.
        rank: of this process among those that sample.
        model: name that the server knows; absent: its only one.
        reload: URL to post new weights to; absent: requests name the folder of the weights as their model.
        concurrency: requests at a time.
        timeout: seconds without a byte until a request is given up.
        tries: of a request that fails in passing: no connection, or an error of the server's own.
        backoff: seconds before the second try; doubled before each further one.
        ask_mode, ask_tokens: reasoning mode and longest reply of ``ask``.

    Attributes:
        dialect: how the server is spoken to; None before the first request.
        gives_logprobs: whether the last answers came with log-probabilities; without, they are NaN.
        retokenised: answers whose text encodes to another number of tokens than the server counted.
    """

    def __init__(
        self,
        url: str,
        encoding: Encoding,
        folder: str | Path,
        *,
        rank: int = 0,
        model: str | None = None,
        reload: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        tries: int = 6,
        backoff: float = 0.5,
        ask_mode: str = "chat",
        ask_tokens: int = 512,
    ) -> None:
        super().__init__(folder, rank)
        self.url, self.encoding, self.reload = url.rstrip("/"), encoding, reload
        for address in filter(None, (url, reload)):
            if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
                raise RecipeError(f"{address} is no address of a server: give http://HOST:PORT/v1.")
        self.concurrency, self._line = concurrency, Line(timeout, tries, backoff)
        self.ask_mode, self.ask_tokens = ask_mode, ask_tokens
        self._model = model
        self.dialect: str | None = None
        self.gives_logprobs = False
        self.retokenised = 0

    @property
    def model(self) -> str:
        """The name that requests give.

        Raises:
            RunError: the server has several models, or can't be reached.
        """
        if self._model is None:
            models = [each["id"] for each in self._line.json("GET", f"{self.url}/models").get("data", [])]
            if len(models) != 1:
                raise RunError(
                    f"{self.url} serves {len(models)} models ({', '.join(models[:5])}): name one in "
                    "rollout.server_model."
                )
            self._model = models[0]
        return self._model

    # -- sampling --------------------------------------------------------------------------------------------

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """The answer to each request; those that the log has complete are not asked for again.

        Raises:
            RunError: the server can't be reached, refuses, or answers something else.
            DataError, CheckpointError: see ``LoggedSampler.resumed``.
        """
        from lab_utils.models.generate import Sample

        resumed = self.resumed(requests, sampling)
        known = self.log.answers
        samples: dict[int, Any] = {
            r.key: Sample(known[r.key].tokens, known[r.key].logprobs, known[r.key].finished)
            for r in resumed
            if known[r.key].final
        }
        for request, sample in self._asked([r for r in resumed if r.key not in samples], sampling):
            self.log.append(
                [(request.key, t, p) for t, p in zip(sample.tokens, sample.logprobs, strict=True)]
            )
            self.completed([request], [sample])
            samples[request.key] = sample
        return [samples[request.key] for request in requests]

    def ask(self, prompts: Sequence[Sequence[Message]]) -> list[str]:
        """A reply to each conversation, at temperature 1, without its reasoning."""
        from lab_utils.models.generate import Request, Sampling

        encoded = [prompt_ids(self.encoding, {"messages": list(p)}, self.ask_mode) for p in prompts]
        requests = [Request(ids, i, self.ask_tokens) for i, ids in enumerate(encoded)]
        found = {request.key: sample for request, sample in self._asked(requests, Sampling(1.0, 1.0, 0, 0))}
        tokenizer = self.encoding.tokenizer
        return [Answer.of(found[i], self.ask_mode, tokenizer).text for i in range(len(prompts))]

    def hand_over(self, path: str | Path) -> None:
        """Have the server take new weights, and wait until it has them.

        ``reload`` that ends in ``/collective_rpc`` is vLLM's, in ``/update_weights_from_disk`` SGLang's; any other is
        posted ``{"path": …}``.

        Args:
            path: folder in transformers' layout, which the server sees under the same name.

        Raises:
            RunError: it doesn't take them.
        """
        path = str(Path(path).resolve())
        try:
            self._hand_over(path)
        except RunError as error:
            raise RunError(f"The server did not take the weights in {path}: {error}") from None

    def _hand_over(self, path: str) -> None:
        reload = (self.reload or "").rstrip("/")
        if self.reload is None:
            self._model = path  # a server that loads the model a request names
            body = {"model": path, "prompt": "a", "max_tokens": 1}
            self._line.json("POST", f"{self.url}/completions", body)
        elif reload.endswith("/collective_rpc"):
            told = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            self._line.json("POST", self.reload, told)
            self._line.json("POST", reload.removesuffix("collective_rpc") + "reset_prefix_cache")
        elif reload.endswith("/update_weights_from_disk"):
            done = self._line.json("POST", self.reload, {"model_path": path})
            if not done.get("success", True):
                raise RunError(f"{self.reload}: {done.get('message', done)}")
        else:
            self._line.json("POST", self.reload, {"path": path})

    # -- requests --------------------------------------------------------------------------------------------

    def _asked(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[Request, Sample]]:
        """Requests with their answers, as they come; the first alone, where the dialect isn't known yet."""
        if requests and self.dialect is None:
            yield requests[0], self._learn(requests[0], sampling)
            requests = requests[1:]
        if not requests:
            return
        pool = ThreadPoolExecutor(min(self.concurrency, len(requests)))
        try:
            waiting = {
                pool.submit(self._one, request, sampling, self.dialect): request for request in requests
            }
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _learn(self, request: Request, sampling: Sampling) -> Sample:
        """The first answer, and with it the dialect."""
        refusals = []
        for dialect in DIALECTS:
            try:
                sample = self._one(request, sampling, dialect)
            except Refused as refusal:
                refusals.append(f"{dialect}: {refusal}")
                continue
            self.dialect = dialect
            return sample
        raise RunError(
            f"{self.url}/completions refuses prompts in every form ({'; '.join(refusals)}): check rollout.server and "
            "rollout.server_model."
        )

    def _one(self, request: Request, sampling: Sampling, dialect: str) -> Sample:
        body = self._body(request, sampling, dialect)
        reply = self._line.json("POST", f"{self.url}/completions", body)
        try:
            choice = reply["choices"][0]
            text, finished = choice["text"], choice["finish_reason"] == "stop"
        except (KeyError, IndexError, TypeError):
            raise RunError(
                f"{self.url}/completions: expected a completion, found {str(reply)[:200]}"
            ) from None
        tokens = _token_ids(choice)
        counted = reply.get("usage") or {}
        if tokens is None:
            tokens = self._encoded(text, request, finished, counted)
            if len(tokens) > request.max_new_tokens:  # encoded otherwise than sampled, and longer
                tokens, finished = tokens[: request.max_new_tokens], False
        return self._sample(request, tokens, choice, finished)

    def _body(self, request: Request, sampling: Sampling, dialect: str) -> dict[str, Any]:
        seed = noise_key(sampling.seed, request.key) & 0x7FFFFFFF
        body = {
            "model": self.model,
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
        }
        if dialect == "tokens":
            asked = {
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "skip_special_tokens": False,
            }
            top_k = {"top_k": sampling.top_k} if sampling.top_k else {}
            return {**body, "prompt": request.prompt, "logprobs": 0, **asked, **top_k}
        body["prompt"] = self.encoding.tokenizer.decode(request.prompt)
        if dialect == "generation_config":
            # The whole of it: what a field leaves out is transformers' default, not the model's.
            eos = self.encoding.tokenizer.eos_id
            settings = {"do_sample": True, "top_k": sampling.top_k, "eos_token_id": eos, "pad_token_id": eos}
            return {**body, "generation_config": json.dumps(settings)}
        if sampling.top_k:
            raise RunError(f"{self.url} takes no top_k, and rollout.top_k is {sampling.top_k}: set it to 0.")
        return body

    # -- replies ---------------------------------------------------------------------------------------------

    def _encoded(self, text: str, request: Request, finished: bool, counted: dict[str, int]) -> list[int]:
        """The tokens of an answer that came as text."""
        tokenizer = self.encoding.tokenizer
        prompt = counted.get("prompt_tokens", len(request.prompt))
        if prompt != len(request.prompt):
            raise RunError(
                f"{self.url} counts {prompt} tokens in a prompt that has {len(request.prompt)}: its tokenizer adds or "
                "splits tokens; serve the run's own tokenizer, or use a server that takes token ids."
            )
        if request.prompt[-1] == tokenizer.special_id(THINK) and END_THINK not in text and finished:
            raise RunError(
                f"{self.url} leaves special tokens out of its text, so reasoning can't be told from the answer: use a "
                "server that gives token ids (vLLM, SGLang), or rollout.modes of chat alone."
            )
        tokens = tokenizer.encode(text, special=True)
        if finished and (not tokens or tokens[-1] != tokenizer.eos_id):
            tokens.append(tokenizer.eos_id)
        self.retokenised += counted.get("completion_tokens", len(tokens)) != len(tokens)
        return tokens

    def _sample(self, request: Request, tokens: list[int], choice: dict[str, Any], finished: bool) -> Sample:
        from lab_utils.models.generate import Sample

        eos = self.encoding.tokenizer.eos_id
        given = (choice.get("logprobs") or {}).get("token_logprobs") or []
        logprobs = [UNKNOWN if value is None else float(value) for value in given]
        if finished and (not tokens or tokens[-1] != eos):
            tokens = [*tokens, eos]  # some servers take it off
        self.gives_logprobs = len(logprobs) >= len(tokens)
        # Fewer than tokens: aligned from the front, as the end token is what a server leaves out.
        logprobs = (logprobs + [UNKNOWN] * len(tokens))[: len(tokens)]
        if len(tokens) > request.max_new_tokens:
            raise RunError(
                f"{self.url} gave {len(tokens)} tokens where {request.max_new_tokens} were asked for: its max_tokens "
                "doesn't bound an answer; use another server."
            )
        return Sample(tokens, logprobs, finished)


def _token_ids(choice: dict[str, Any]) -> list[int] | None:
    """The ids that a server gave, in either of two ways; None where it gave none."""
    if choice.get("token_ids") is not None:
        return [int(token) for token in choice["token_ids"]]
    marked = (choice.get("logprobs") or {}).get("tokens") or []
    if marked and all(str(token).startswith("token_id:") for token in marked):
        return [int(token.removeprefix("token_id:")) for token in marked]
    return None
