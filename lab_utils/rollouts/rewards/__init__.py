"""Rewards: one file each, whose ``REWARD`` is a class; ``objective.rewards[].name`` names the file.

Arguments of the class are its options; a file whose class needs some has ``EXAMPLE``, options that it works with.

A reward scores many answers at once. It gives NaN for an answer that it has nothing to say about, so that several
rewards can share a data set: ``exact`` speaks of rows with ``verify``, ``code`` of rows with ``tests``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lab_utils.data.tokenizer import END_THINK
from lab_utils.errors import RecipeError
from lab_utils.registry import load, nearest

if TYPE_CHECKING:
    from lab_utils.data.tokenizer import ChatTokenizer
    from lab_utils.models.generate import Sample

Row = dict[str, Any]
Ask = Callable[[list[list[dict[str, Any]]]], list[str]]
SILENT = float("nan")


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    Attributes:
        text: the answer proper: no reasoning, no end token; tool calls as their markup.
        tokens: ids of everything sampled, the end token included.
        finished: it ended by itself.
        mode: reasoning mode of its prompt: chat, thinking or max.
        reasoning: what stood before the end of thinking; empty in mode chat.
        closed: the reasoning ended; always so in mode chat.
    """

    text: str
    tokens: list[int]
    finished: bool
    mode: str = "chat"
    reasoning: str = ""
    closed: bool = True

    @classmethod
    def of(cls, sample: Sample, mode: str, tokenizer: ChatTokenizer) -> Answer:
        """A sample as an answer. Reasoning that never ends is followed by no text."""
        tokens = list(sample.tokens)
        said = tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_id else tokens
        if mode == "chat":
            return cls(tokenizer.decode(said), tokens, sample.finished, mode)
        end = tokenizer.special_id(
            END_THINK
        )  # the token; a model that spells it out in letters goes on thinking
        at = said.index(end) if end in said else len(said)
        text, reasoning = tokenizer.decode(said[at + 1 :]), tokenizer.decode(said[:at])
        return cls(text, tokens, sample.finished, mode, reasoning, end in said)


class Reward(Protocol):
    def score(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """A number an answer; NaN where there is nothing to say.

        Args:
            rows: the prompt's row of each answer.
            answers: as many; possibly none, since every rank of a run scores equally often.
        """
        ...


def load_rewards(sources: Sequence[Any], *, ask: Ask | None = None) -> dict[str, tuple[Reward, float]]:
    """The rewards of a recipe with their weights, by name; the second of one name is ``name_2``.

    Args:
        sources: ``objective.rewards``: each has ``name``, ``weight`` and ``options``.
        ask: replies to conversations; for rewards that ask a model.

    Raises:
        RecipeError: an unknown reward or option, a missing one, or a reward that needs ``ask`` without it.
    """
    found: dict[str, tuple[Reward, float]] = {}
    for source in sources:
        same = sum(key == source.name or key.startswith(f"{source.name}_") for key in found)
        name = f"{source.name}_{same + 1}" if same else source.name
        found[name] = (get_reward(source.name, source.options, ask=ask), float(source.weight))
    return found


def get_reward(name: str, options: dict[str, Any] | None = None, *, ask: Ask | None = None) -> Reward:
    """One reward with its options. Raises: as ``load_rewards``."""
    try:
        reward = load(__name__, name).REWARD
    except KeyError as error:
        raise RecipeError(f"objective.rewards: {error.args[0]}") from None
    options, known = dict(options or {}), inspect.signature(reward).parameters
    for option in options:
        if option not in known or option == "ask":
            choices = [each for each in known if each != "ask"]
            hint = nearest(option, choices) if choices else "it takes none"
            raise RecipeError(f"objective.rewards: {name} has no option '{option}': {hint}.")
    for option, parameter in known.items():
        if option != "ask" and parameter.default is parameter.empty and option not in options:
            raise RecipeError(
                f"objective.rewards: {name} needs its option '{option}': give it under options."
            )
    if "ask" in known:
        if ask is None:
            raise RecipeError(
                f"objective.rewards: {name} asks a model, and there is none to ask: leave it out."
            )
        options["ask"] = ask
    try:
        return reward(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"objective.rewards: options of {name}: {error}.") from None
