"""Sorting, picking, counting, filtering and reversing short lists of words or numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lab_utils.data.tasks._base import Example, Message, Skill, ask, draw_skill, exact, perturb, tell
from lab_utils.data.tasks._rng import Rng
from lab_utils.data.tasks._words import CATEGORIES, ORDINALS, PLURALS, WORDS

verify = exact


def _show(items: Sequence) -> str:
    return ", ".join(map(str, items))


def _numbers(answer: Callable[[list[int]], str], low: int = 3, high: int = 3) -> Callable[[Rng], dict]:
    def draw(rng: Rng) -> dict:
        items = rng.sample(range(1, 31), rng.between(low, high))
        return {"l": _show(items), "answer": answer(items)}

    return draw


def _words(answer: Callable[[list[str]], str], low: int = 3, high: int = 4) -> Callable[[Rng], dict]:
    def draw(rng: Rng) -> dict:
        items = rng.sample(WORDS, rng.between(low, high))
        return {"l": _show(items), "answer": answer(items)}

    return draw


def _alphabet(rng: Rng) -> dict:
    """Three words with different first letters, so that one letter decides."""
    items: list[str] = []
    while len(items) < 3:
        word = rng.pick(WORDS)
        if all(word[0] != other[0] for other in items):
            items.append(word)
    return {"l": _show(items), "answer": _show(sorted(items))}


def _nth(rng: Rng) -> dict:
    items = rng.sample(WORDS, rng.between(3, 4))
    n = rng.below(len(items))
    return {"l": _show(items), "n": ORDINALS[n], "answer": items[n]}


def _filter(rng: Rng) -> dict:
    category, other = rng.sample(list(CATEGORIES), 2)
    chosen = rng.sample(CATEGORIES[category], rng.between(1, 2))
    items = [*chosen, *rng.sample(CATEGORIES[other], 4 - len(chosen) - rng.below(2))]
    items = rng.sample(items, len(items))
    return {
        "l": _show(items),
        "c": PLURALS[category],
        "answer": _show([w for w in items if w in CATEGORIES[category]]),
    }


def _remove(rng: Rng) -> dict:
    items = rng.sample(WORDS, rng.between(3, 4))
    gone = rng.pick(items)
    return {"l": _show(items), "w": gone, "answer": _show([w for w in items if w != gone])}


def _by_list(name: str) -> Callable[[dict], str]:
    return lambda v: f"{name}:{v['l']}"


def _by_set(name: str) -> Callable[[dict], str]:
    return lambda v: f"{name}:{_show(sorted(v['l'].split(', ')))}"


SKILLS = (
    Skill(
        "sort",
        _numbers(lambda x: _show(sorted(x))),
        (
            "Sort these numbers: {l}",
            "Sort {l} from small to large.",
            "Put {l} in order, smallest first.",
            "Order these numbers from small to large: {l}",
            "Please sort the numbers {l}.",
            "Arrange {l} from smallest to largest.",
            "Here are some numbers: {l}. Sort them.",
            "Write {l} in rising order.",
            "Can you sort {l}?",
            "Sort the list {l} in rising order.",
        ),
        (
            "Sorted from small to large, {l} becomes {answer}.",
            "The numbers {l} in rising order are {answer}.",
            "Sort {l} and you get {answer}.",
            "In order, smallest first, {l} is {answer}.",
        ),
        fact=_by_set("sort"),
        weight=1.8,
    ),
    Skill(
        "alphabet",
        _alphabet,
        (
            "Sort these words by the alphabet: {l}",
            "Put {l} in alphabetical order.",
            "Sort {l} from a to z.",
            "Order the words {l} by the alphabet.",
            "Please sort {l} alphabetically.",
            "Arrange these words from a to z: {l}",
            "Here are some words: {l}. Sort them by the alphabet.",
            "Write {l} in alphabetical order.",
        ),
        (
            "By the alphabet, {l} becomes {answer}.",
            "In alphabetical order, {l} is {answer}.",
            "Sorted from a to z, {l} becomes {answer}.",
            "The words {l} in alphabetical order are {answer}.",
        ),
        fact=_by_set("alphabet"),
        weight=1.4,
    ),
    Skill(
        "nth",
        _nth,
        (
            "What is the {n} item of {l}?",
            "Which word is {n} in the list {l}?",
            "Give me the {n} word: {l}",
            "Pick the {n} item from {l}.",
            "What comes {n} in {l}?",
            "Name the {n} word of this list: {l}",
            "From {l}, tell me the {n} word.",
            "Here is a list: {l}. What is the {n} item?",
            "List: {l}. Which item is {n}?",
            "Please give the {n} item of {l}.",
        ),
        (
            "The {n} word of {l} is {answer}.",
            "In the list {l}, {answer} is {n}.",
            "In {l}, {answer} comes {n}.",
            "The {n} item of the list {l} is {answer}.",
        ),
        fact=lambda v: f"nth:{v['n']}:{v['l']}",
        weight=1.4,
    ),
    Skill(
        "last",
        _words(lambda x: x[-1]),
        (
            "What is the last item of {l}?",
            "Which word is last in the list {l}?",
            "Give me the last word: {l}",
            "Pick the last item from {l}.",
            "What comes last in {l}?",
            "Name the last word of this list: {l}",
            "From {l}, tell me the last word.",
            "Here is a list: {l}. What is the last item?",
        ),
        (
            "The last word of {l} is {answer}.",
            "In the list {l}, {answer} is last.",
            "In {l}, {answer} comes last.",
        ),
        fact=_by_list("last"),
        weight=0.7,
    ),
    Skill(
        "largest",
        _numbers(lambda x: str(max(x))),
        (
            "What is the largest of {l}?",
            "Which number is the largest: {l}?",
            "Find the biggest number in {l}.",
            "Give me the largest number of {l}.",
            "Which of {l} is the largest?",
            "Pick the largest number from {l}.",
            "Here are some numbers: {l}. Which is the largest?",
            "Largest number in {l}?",
        ),
        (
            "The largest of {l} is {answer}.",
            "Of the numbers {l}, {answer} is the largest.",
            "The biggest number in {l} is {answer}.",
        ),
        fact=_by_set("largest"),
    ),
    Skill(
        "smallest",
        _numbers(lambda x: str(min(x))),
        (
            "What is the smallest of {l}?",
            "Which number is the smallest: {l}?",
            "Find the smallest number in {l}.",
            "Give me the smallest number of {l}.",
            "Which of {l} is the smallest?",
            "Pick the smallest number from {l}.",
            "Here are some numbers: {l}. Which is the smallest?",
            "Smallest number in {l}?",
        ),
        (
            "The smallest of {l} is {answer}.",
            "Of the numbers {l}, {answer} is the smallest.",
            "The smallest number in {l} is {answer}.",
        ),
        fact=_by_set("smallest"),
    ),
    Skill(
        "count",
        _words(lambda x: str(len(x)), 2, 6),
        (
            "How many words are in this list: {l}?",
            "Count the items: {l}",
            "How many items does {l} have?",
            "Count the words in {l}.",
            "How many things do I name: {l}?",
            "Here is a list: {l}. How many items are there?",
            "Tell me how many words you see: {l}",
            "How long is the list {l}?",
        ),
        (
            "The list {l} has {answer} items.",
            "There are {answer} words in {l}.",
            "Count {l} and you get {answer}.",
            "{l} makes {answer} words.",
        ),
        fact=_by_list("count"),
        weight=1.2,
    ),
    Skill(
        "filter",
        _filter,
        (
            "Which of these are {c}: {l}?",
            "Keep only the {c}: {l}",
            "Name the {c} in this list: {l}",
            "Pick the {c} from {l}.",
            "From {l}, keep the {c}.",
            "Find the {c} in {l}.",
            "Here is a list: {l}. Give me only the {c}.",
            "Please list the {c} in {l}.",
            "What {c} are in {l}?",
        ),
        (
            "The {c} in {l} are {answer}.",
            "Of {l}, only {answer} counts among the {c}.",
            "Keep only the {c} of {l} and you have {answer}.",
            "Looking for {c} in {l}, we find {answer}.",
        ),
        fact=lambda v: f"filter:{v['c']}:{v['l']}",
        weight=1.4,
    ),
    Skill(
        "reverse",
        _words(lambda x: _show(x[::-1]), 3, 4),
        (
            "Reverse this list: {l}",
            "Write the list {l} from the end.",
            "Turn the list {l} around.",
            "Put {l} in reverse order.",
            "Give {l} in reverse order.",
            "Please reverse the list {l}.",
            "Reverse the order of {l}.",
            "Here is a list: {l}. Reverse it.",
        ),
        (
            "In reverse order, {l} is {answer}.",
            "Reverse the list {l} and you get {answer}.",
            "Turn the list {l} around and it is {answer}.",
        ),
        fact=_by_list("reverse"),
        weight=1.2,
    ),
    Skill(
        "remove",
        _remove,
        (
            "Remove {w} from {l}.",
            "Take {w} out of {l}.",
            "Here is a list: {l}. Remove {w}.",
            "Delete {w} from the list {l}.",
            "What is left of {l} without {w}?",
            "Write {l} without {w}.",
            "Drop {w} from {l}.",
            "Please remove {w} from this list: {l}",
        ),
        (
            "Without {w}, {l} is {answer}.",
            "Remove {w} from {l} and {answer} is left.",
            "Take {w} out of {l} and you have {answer}.",
        ),
        fact=lambda v: f"remove:{v['w']}:{v['l']}",
        weight=1.2,
    ),
)


def generate(rng: Rng) -> Example:
    return ask("lists", draw_skill(SKILLS, rng), rng)


def reject(example: Example, rng: Rng) -> Message:
    return perturb(example, rng)


def text(rng: Rng) -> str:
    return tell(draw_skill(SKILLS, rng), rng)
