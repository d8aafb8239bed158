"""Spelling, reversing, counting letters, capitals, repeating and joining words of the closed vocabulary."""

from __future__ import annotations

from collections.abc import Callable

from lab_utils.data.tasks._base import Example, Message, Skill, ask, draw_skill, exact, perturb, tell
from lab_utils.data.tasks._rng import Rng
from lab_utils.data.tasks._words import SHORT, WORDS

verify = exact


def _word(answer: Callable[[str], str], words: list[str] = WORDS) -> Callable[[Rng], dict]:
    def draw(rng: Rng) -> dict:
        word = rng.pick(words)
        return {"w": word, "answer": answer(word)}

    return draw


def _pair(answer: Callable[[str, str], str]) -> Callable[[Rng], dict]:
    def draw(rng: Rng) -> dict:
        u, w = rng.sample(WORDS, 2)
        return {"u": u, "w": w, "answer": answer(u, w)}

    return draw


SKILLS = (
    Skill(
        "dashes",
        _word("-".join),
        (
            "Spell {w} with dashes.",
            "Spell the word {w} with dashes between the letters.",
            "Write {w} letter by letter, with dashes.",
            "Put a dash between the letters of {w}.",
            "How do you spell {w}? Use dashes.",
            "Please spell {w}, with a dash after each letter but the last.",
            "Show me the letters of {w} with dashes.",
            "{w}: spell it with dashes.",
        ),
        (
            "{answer} spells {w}.",
            "With dashes, {w} is spelled {answer}.",
            "The word {w} is spelled {answer}.",
            "You spell {w} like this: {answer}.",
        ),
        weight=1.6,
    ),
    Skill(
        "spaces",
        _word(" ".join),
        (
            "Spell {w} with spaces.",
            "Write the letters of {w} with spaces between them.",
            "Put spaces between the letters of {w}.",
            "Spell {w}, a space between the letters.",
            "Write {w} letter by letter, with spaces.",
            "Show the letters of {w}, with a space between them.",
            "Please spell {w} using spaces.",
            "{w}: spell it with spaces.",
        ),
        (
            "The letters {answer} make {w}.",
            "With spaces, {w} is {answer}.",
            "The letters of {w} are {answer}.",
            "Write {w} with spaces and you see {answer}.",
        ),
    ),
    Skill(
        "reverse",
        _word(lambda w: w[::-1], SHORT),
        (
            "Reverse the word {w}.",
            "Write {w} backwards.",
            "What is {w} backwards?",
            "Turn the word {w} around.",
            "Spell {w} from the end to the start, as one word.",
            "What is the reverse of {w}?",
            "Read {w} from right to left.",
            "Give me {w} in reverse.",
            "Please reverse {w}.",
            "How does {w} look backwards?",
        ),
        (
            "The reverse of {w} is {answer}.",
            "Backwards, {w} is {answer}.",
            "{w} from right to left is {answer}.",
            "Turn {w} around and it reads {answer}.",
            "{answer} is {w} backwards.",
        ),
        weight=1.4,
    ),
    Skill(
        "first",
        _word(lambda w: w[0]),
        (
            "What is the first letter of {w}?",
            "Which letter does {w} start with?",
            "Give me the first letter of {w}.",
            "With which letter does {w} begin?",
            "First letter of {w}?",
            "Name the letter that starts {w}.",
            "Tell me the first letter of the word {w}.",
            "What letter does the word {w} begin with?",
        ),
        (
            "The first letter of {w} is {answer}.",
            "{w} starts with {answer}.",
            "{w} begins with the letter {answer}.",
        ),
    ),
    Skill(
        "last",
        _word(lambda w: w[-1]),
        (
            "What is the last letter of {w}?",
            "Which letter does {w} end with?",
            "Give me the last letter of {w}.",
            "With which letter does {w} end?",
            "Last letter of {w}?",
            "Name the letter that ends {w}.",
            "Tell me the last letter of the word {w}.",
            "What letter does the word {w} end in?",
        ),
        (
            "The last letter of {w} is {answer}.",
            "{w} ends with {answer}.",
            "{w} ends in the letter {answer}.",
        ),
    ),
    Skill(
        "length",
        _word(lambda w: str(len(w))),
        (
            "How many letters does {w} have?",
            "Count the letters of {w}.",
            "How long is the word {w}?",
            "How many letters are in {w}?",
            "Count the letters in the word {w}.",
            "Tell me how many letters {w} has.",
            "What is the number of letters in {w}?",
            "The word {w} has how many letters?",
        ),
        (
            "The word {w} has {answer} letters.",
            "There are {answer} letters in {w}.",
            "{w} is {answer} letters long.",
            "Count the letters of {w} and you get {answer}.",
        ),
        weight=1.2,
    ),
    Skill(
        "upper",
        _word(str.upper),
        (
            "Write {w} in capital letters.",
            "Put {w} in capitals.",
            "Write the word {w} in upper case.",
            "Make {w} upper case.",
            "Turn {w} into capital letters.",
            "How does {w} look in capital letters?",
            "Please write {w} in big letters.",
            "Give me {w} in capitals.",
        ),
        (
            "In capital letters, {w} is {answer}.",
            "{w} in capitals is {answer}.",
            "The sign says {answer}, which is {w} in big letters.",
            "In upper case, {w} becomes {answer}.",
        ),
        weight=1.4,
    ),
    Skill(
        "lower",
        lambda rng: (lambda w: {"u": w.upper(), "answer": w})(rng.pick(WORDS)),
        (
            "Write {u} in small letters.",
            "Put {u} in lower case.",
            "Make {u} lower case.",
            "Turn {u} into small letters.",
            "How does {u} look in small letters?",
            "Give me {u} in lower case.",
            "Please write {u} in small letters.",
            "{u}: write it in lower case.",
        ),
        (
            "In small letters, {u} is {answer}.",
            "{u} in lower case is {answer}.",
            "{u} becomes {answer} in small letters.",
        ),
        weight=0.8,
    ),
    Skill(
        "thrice",
        _word(lambda w: f"{w} {w} {w}"),
        (
            "Repeat {w} three times.",
            "Say {w} three times.",
            "Write {w} three times.",
            "Write the word {w} three times with spaces.",
            "Three times {w}, please.",
            "Give me {w} three times in a row.",
            "Please repeat the word {w} three times.",
            "Say the word {w} three times in a row.",
        ),
        (
            "{w} three times is {answer}.",
            "He said {w} three times: {answer}.",
            "Repeat {w} three times and you have {answer}.",
        ),
        weight=0.7,
    ),
    Skill(
        "join",
        _pair(lambda u, w: f"{u}-{w}"),
        (
            "Join {u} and {w} with a dash.",
            "Put a dash between {u} and {w}.",
            "Connect {u} and {w} with a dash.",
            "Write {u} and {w} with a dash between them.",
            "Join the words {u} and {w} using a dash.",
            "Make one word of {u} and {w}, with a dash.",
            "Please join {u} and {w} by a dash.",
            "Link {u} and {w} with a dash.",
        ),
        (
            "{u} and {w} with a dash is {answer}.",
            "Join {u} and {w} with a dash and you get {answer}.",
            "With a dash between them, {u} and {w} become {answer}.",
        ),
        fact=lambda v: f"join:{v['u']},{v['w']}",
        weight=0.8,
    ),
    Skill(
        "swap",
        _pair(lambda u, w: f"{w} {u}"),
        (
            "Swap the words: {u} {w}",
            "Swap the two words {u} {w}.",
            "Change the order of the words {u} {w}.",
            "Write {u} {w} in the other order.",
            "Turn around the order of {u} {w}.",
            "Put the words {u} {w} in the other order.",
            "Please swap {u} {w}.",
            "The words are {u} {w}. Swap them.",
        ),
        (
            "Swap {u} {w} and it becomes {answer}.",
            "{u} {w} in the other order is {answer}.",
            "The two words {u} {w} were swapped to {answer}.",
        ),
        fact=lambda v: f"swap:{v['u']},{v['w']}",
        weight=0.9,
    ),
)


def generate(rng: Rng) -> Example:
    return ask("strings", draw_skill(SKILLS, rng), rng)


def reject(example: Example, rng: Rng) -> Message:
    return perturb(example, rng)


def text(rng: Rng) -> str:
    return tell(draw_skill(SKILLS, rng), rng)
