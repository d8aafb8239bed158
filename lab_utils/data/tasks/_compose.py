"""Examples of one split, in the shapes of the shipped sets: messages, preference, prompts, running text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lab_utils.data.tasks._base import Example, families, family, normalise
from lab_utils.data.tasks._rng import Rng
from lab_utils.data.tasks._words import ITEMS, NAMES

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Be brief.",
    "Answer briefly.",
    "You are a friendly helper.",
    "Give short answers.",
    "Answer with the result only.",
    "You help with small tasks.",
    "Be short and exact.",
)
# Share of the training examples; what takes longer to learn comes more often.
WEIGHTS = {"arithmetic": 1.4, "strings": 1.3, "lists": 1.5, "word_problems": 1.2, "tools": 0.5, "safety": 0.7}


def question(example: Example) -> str:
    """The normalised text of the last user message: what no two splits may share."""
    users = [m["content"] for m in example.messages if m["role"] == "user"]
    return normalise(users[-1])


def draw(rng: Rng, split: str, name: str) -> Example:
    """One example of a family whose key belongs to ``split``."""
    module = family(name)
    while True:
        example = module.generate(rng)
        if example.split == split:
            return example


def examples(
    rng: Rng, split: str, rows: int, balanced: bool, names: list[str] | None = None
) -> Iterator[Example]:
    """``rows`` examples of one split.

    Args:
        rng: where every choice comes from.
        split: ``train``, ``validation`` or ``test``.
        rows: how many.
        balanced: True gives every family its turn and no question twice (evaluation); False draws by
        ``WEIGHTS``
            and lets the questions of small families come back (training).
        names: families; absent: all.
    """
    names = names or families()
    weights = [WEIGHTS.get(name, 1.0) for name in names]
    seen: set[str] = set()
    for i in range(rows):
        name = names[i % len(names)] if balanced else rng.weighted(names, weights)
        for _ in range(400 if balanced else 4):
            example = draw(rng, split, name)
            if (asked := question(example)) not in seen:
                break
        seen.add(asked)
        yield _dress(example, rng, split, names)


def _dress(example: Example, rng: Rng, split: str, names: list[str]) -> Example:
    """Now and then an earlier turn of the same split, or a system prompt."""
    messages = example.messages
    if messages[0]["role"] == "system":
        return example
    if not example.tools and rng.chance(0.12):
        before = draw(rng, split, rng.pick([n for n in names if n != "tools"] or names))
        if not before.tools:
            messages = (*before.messages, before.answer, *messages)
    if messages[0]["role"] != "system" and rng.chance(0.12):
        messages = ({"role": "system", "content": rng.pick(SYSTEM_PROMPTS)}, *messages)
    return Example(example.family, messages, example.answer, example.spec, example.key, example.tools)


def _row(example: Example, **columns: Any) -> dict[str, Any]:
    tools = {"tools": list(example.tools)} if example.tools else {}
    return {**columns, **tools, "family": example.family, "verify": example.spec}


def messages(seed: int, split: str, rows: int, balanced: bool = False) -> Iterator[dict[str, Any]]:
    """Chats that end with the gold answer."""
    for example in examples(Rng(seed), split, rows, balanced):
        yield _row(example, messages=[*example.messages, example.answer])


def preference(seed: int, split: str, rows: int, balanced: bool = False) -> Iterator[dict[str, Any]]:
    """A prompt with the gold answer as ``chosen`` and a failing one as ``rejected``."""
    rng = Rng(seed)
    for example in examples(rng, split, rows, balanced):
        rejected = family(example.family).reject(example, rng)
        yield _row(example, prompt=list(example.messages), chosen=[example.answer], rejected=[rejected])


def prompts(seed: int, split: str, rows: int, balanced: bool = False) -> Iterator[dict[str, Any]]:
    """Questions without the answer, for rollouts; ``verify`` is the reward."""
    for example in examples(Rng(seed), split, rows, balanced):
        yield _row(example, messages=list(example.messages))


# -- running text --------------------------------------------------------------------------------------------

TEXT_WEIGHTS = {
    "arithmetic": 2.2,
    "strings": 1.6,
    "lists": 2.0,
    "word_problems": 1.2,
    "tools": 0.7,
    "safety": 0.7,
}
SCENES = (
    "{n} and {m} sat in the kitchen and asked each other small questions.",
    "Here are some notes of {n}.",
    "{n} keeps a small book of things worth knowing.",
    "On a rainy day {n} wrote down what {m} had said.",
    "{n} told {m} a few things about the world.",
    "A page from the school book of {n}:",
    "{m} read aloud, and {n} listened.",
    "What {n} learned this week:",
    "In the evening {m} went through the list again.",
)
ASIDES = (
    "{n} asked {m} about it, and {m} said the same.",
    "{m} did not believe it at first.",
    "{n} wrote it down.",
    "Please tell {m}, said {n}.",
    "What is next? asked {m}.",
    "Then {n} gave {m} some {i}.",
    "How do you know? asked {n}. {m} showed how to work it out.",
    "Which one do you want? asked {n}, and {m} picked one.",
    "Can you do it too? Give me a list of {i}, said {m}.",
    "{n} said: find it, count it, write it, and put it in order.",
    "Sorry, said {n}, I can't help with the {i} today.",
)


def text(seed: int, split: str, rows: int) -> Iterator[dict[str, Any]]:
    """Documents of running text about the same world, without any chat form.

    Nothing held out is told: facts whose key belongs to validation or test occur in no split of the text.
    ``split`` only picks another stream of the same distribution.
    """
    rng = Rng(seed * 3 + ("train", "validation", "test").index(split))
    names = families()
    weights = [TEXT_WEIGHTS.get(name, 1.0) for name in names]
    for _ in range(rows):
        people = rng.sample(NAMES, 2)
        values = {"n": people[0], "m": people[1], "i": rng.pick(ITEMS)}
        passages = [rng.pick(SCENES).format_map(values)] if rng.chance(0.3) else []
        topic = (
            rng.weighted(names, weights) if rng.chance(0.5) else None
        )  # half of the documents stay with one
        for _ in range(rng.between(4, 10)):
            passages.append(family(topic or rng.weighted(names, weights)).text(rng))
            if rng.chance(0.06):
                passages.append(rng.pick(ASIDES).format_map(values))
        joined = passages[0]
        for passage in passages[1:]:
            joined += passage if joined.endswith("\n") else f" {passage}"
        yield {"text": joined.strip()}
