"""What the families share: the example, skills with their wordings, held-out keys, verification.

**Splits.** Every question has a key and ``split_of(key)`` says to which split it belongs. Where the space of
facts is large (pairs of numbers, lists), the key is the fact itself, whatever the wording: a held-out fact
then appears in no training question *and* in no pre-training text. Where the space is small (times tables,
unit tables, words), a fact that was never told cannot be known, so the key is the normalised question: the
fact is told in the text, the question is new.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from lab_utils.data.tasks._rng import Rng
from lab_utils.registry import load, members

PACKAGE = "lab_utils.data.tasks"
# Percent of the key space.
TEST_PERCENT, VALIDATION_PERCENT = 5, 4

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One question with its gold answer.

    Attributes:
        family: the module that verifies it.
        messages: what stands before the answer; the last one is the user's (or a tool's result).
        answer: the gold assistant message.
        spec: how to verify, JSON-able: ``{"family", "kind", "expected", …}``.
        key: decides the split (see the module's head).
        tools: tool definitions that the model is shown.
    """

    family: str
    messages: tuple[Message, ...]
    answer: Message
    spec: dict[str, Any]
    key: str
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def split(self) -> str:
        return split_of(self.key)


@dataclass(frozen=True)
class Skill:
    """One thing that can be asked, and told.

    Attributes:
        name: first part of the held-out key.
        draw: values for the wordings; ``answer`` among them.
        asks: wordings of the question.
        tells: statements of the same fact, for running text.
        fact: the key of a fact that can be held out; None where the question's wording is the key.
        weight: how often the skill is drawn within its family.
        kind: the family's own name for how the answer is verified.
        reason: reasoning_content that a few answers carry (unused in chat mode).
    """

    name: str
    draw: Callable[[Rng], dict[str, Any]]
    asks: tuple[str, ...]
    tells: tuple[str, ...]
    fact: Callable[[dict[str, Any]], str | None] | None = None
    weight: float = 1.0
    kind: str = "exact"
    reason: str | None = None


def families() -> list[str]:
    """Names of all families."""
    return members(PACKAGE)


@cache
def family(name: str) -> ModuleType:
    """The module of one family; KeyError names the nearest one."""
    return load(PACKAGE, name)


def normalise(text: str) -> str:
    """Lower case, words and numbers only: two questions that differ in nothing else are the same question."""
    return " ".join(re.findall(r"\w+|[^\w\s.,:;!?'\"]", text.lower()))


@cache
def split_of(key: str) -> str:
    """``train``, ``validation`` or ``test``: a fixed function of the key."""
    percent = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 100
    if percent < TEST_PERCENT:
        return "test"
    return "validation" if percent < TEST_PERCENT + VALIDATION_PERCENT else "train"


def held_out(key: str) -> bool:
    return split_of(key) != "train"


# -- asking and telling --------------------------------------------------------------------------------------


def draw_skill(skills: tuple[Skill, ...], rng: Rng) -> Skill:
    return rng.weighted(skills, [s.weight for s in skills])


def ask(name: str, skill: Skill, rng: Rng) -> Example:
    """An example of one skill in a random wording.

    A wording with ``||`` has a system prompt before it. ``values["spec"]`` adds to what verification is told.
    """
    values = skill.draw(rng)
    system, _, question = rng.pick(skill.asks).format_map(values).rpartition("||")
    answer: Message = {"role": "assistant", "content": values["answer"]}
    if skill.reason and rng.chance(0.08):
        answer["reasoning_content"] = skill.reason.format_map(values)
    key = (skill.fact and skill.fact(values)) or f"{name}:{normalise(question)}"
    spec = {"family": name, "kind": skill.kind, "expected": values["answer"], **values.get("spec", {})}
    messages: tuple[Message, ...] = ({"role": "user", "content": question},)
    if system:
        messages = ({"role": "system", "content": system}, *messages)
    return Example(name, messages, answer, spec, key)


def tell(skill: Skill, rng: Rng) -> str:
    """A statement of one fact that is not held out."""
    while True:
        values = skill.draw(rng)
        fact = skill.fact and skill.fact(values)
        if not fact or not held_out(fact):
            return rng.pick(skill.tells).format_map(values)


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


# -- verification --------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Without surrounding whitespace and one final full stop."""
    return text.strip().removesuffix(".").rstrip()


def exact(example: Example, answer: str) -> bool:
    """The expected answer, to the character, after ``clean``."""
    return clean(answer) == clean(example.spec["expected"])


def verify_row(row: dict[str, Any], answer: str) -> bool:
    """Whether ``answer`` (what the model wrote, without the end token) solves a row of a shipped set.

    Args:
        row: has ``messages`` (the question, with or without the gold answer) and ``verify``.
        answer: the completion; for a tool call, its markup as generated.
    """
    spec = row["verify"]
    example = Example(spec["family"], tuple(row["messages"]), {}, spec, "", tuple(row.get("tools") or ()))
    return bool(family(spec["family"]).verify(example, answer))


def perturb(example: Example, rng: Rng) -> Message:
    """A plausible wrong answer: a wrong result in the right form, or a right one in the wrong form."""
    expected = example.spec["expected"]
    makers = [_chatty]
    if re.search(r"\d", expected):
        makers += [_other_number, _other_number]
    if len(re.findall(r"\w+", expected)) > 1:
        makers += [_swapped, _swapped]
    elif not expected.isdigit():
        makers += [_misspelt, _misspelt]
    if expected in ("yes", "no"):
        makers = [_chatty, lambda text, rng: "no" if text == "yes" else "yes"]
    while True:
        text = rng.pick(makers)(expected, rng)
        if text and not family(example.family).verify(example, text):
            return {"role": "assistant", "content": text}
        makers = [*makers, _chatty]  # some answers have no wrong version of every kind


def _chatty(expected: str, rng: Rng) -> str:
    return rng.pick(
        ("The answer is {}, I think.", "Sure! It is {}. Anything else?", "Well, maybe {}?")
    ).format(expected)


def _other_number(expected: str, rng: Rng) -> str:
    return re.sub(
        r"\d+", lambda m: str(abs(int(m[0]) + rng.pick((-10, -2, -1, 1, 2, 10)))), expected, count=1
    )


def _swapped(expected: str, rng: Rng) -> str:
    parts = re.split(r"(\W+)", expected)
    i, j = rng.sample([k for k, part in enumerate(parts) if re.match(r"\w", part)], 2)
    parts[i], parts[j] = parts[j], parts[i]
    return "".join(parts)


def _misspelt(expected: str, rng: Rng) -> str:
    i = rng.below(len(expected))
    return expected[:i] + expected[i + 1 :] if rng.chance(0.5) else expected[:i] + expected[i] + expected[i:]
