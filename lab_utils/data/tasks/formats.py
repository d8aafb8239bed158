"""Small knowledge in a prescribed form: JSON, bullets, numbers, yes or no, capitals, exactly n words."""

from __future__ import annotations

import json

from lab_utils.data.tasks._base import Example, Message, Skill, ask, clean, draw_skill, exact, perturb, tell
from lab_utils.data.tasks._rng import Rng
from lab_utils.data.tasks._words import CATEGORIES, NAMES, OPPOSITES, PLURALS, WORDS, a
from lab_utils.data.tasks.arithmetic import TOP, comparison_key

NUMBERS = {2: "two", 3: "three", 4: "four"}
_CATEGORY = {word: category for category, words in CATEGORIES.items() for word in words}


def verify(example: Example, answer: str) -> bool:
    """By the form that was asked for: JSON by value, lists by line, n members of a category in any choice."""
    spec = example.spec
    kind, expected = spec["kind"], spec["expected"]
    if kind == "json":
        try:
            return json.loads(answer) == json.loads(expected)
        except ValueError:
            return False
    if kind == "lines":
        return [line.strip() for line in answer.strip().splitlines()] == expected.splitlines()
    if kind == "yes_no":
        return clean(answer).lower() == expected
    if kind == "members":
        words = clean(answer).split(spec["separator"])
        known = CATEGORIES[spec["category"]]
        return len(words) == spec["n"] == len({w.strip() for w in words}) and all(
            w.strip() in known for w in words
        )
    return exact(example, answer)


def _person(rng: Rng) -> dict:
    name, age = rng.pick(NAMES), rng.between(2, 90)
    return {"n": name, "g": age, "answer": json.dumps({"name": name, "age": age})}


def _object(rng: Rng) -> dict:
    colour, item = rng.pick(CATEGORIES["colour"]), rng.pick([w for w in WORDS if w not in _CATEGORY])
    answer = json.dumps({"item": item, "colour": colour})
    return {"c": colour, "w": item, "answer": answer}


def _things(rng: Rng, low: int = 2, high: int = 4) -> tuple[list[str], dict]:
    items = rng.sample(WORDS, rng.between(low, high))
    return items, {"l": ", ".join(items), "and": ", ".join(items[:-1]) + " and " + items[-1]}


def _bullets(rng: Rng) -> dict:
    items, values = _things(rng)
    return {**values, "answer": "\n".join(f"- {w}" for w in items)}


def _numbered(rng: Rng) -> dict:
    items, values = _things(rng)
    return {**values, "answer": "\n".join(f"{i}. {w}" for i, w in enumerate(items, 1))}


def _array(rng: Rng) -> dict:
    items, values = _things(rng)
    return {**values, "answer": json.dumps(items)}


def _is_a(rng: Rng) -> dict:
    word = rng.pick(list(_CATEGORY))
    category = (
        _CATEGORY[word] if rng.chance(0.5) else rng.pick([c for c in CATEGORIES if c != _CATEGORY[word]])
    )
    yes = category == _CATEGORY[word]
    thing = word if category == "colour" or _CATEGORY[word] == "colour" else a(word)
    return {"w": thing, "c": a(category), "answer": "yes" if yes else "no", "is": "is" if yes else "is not"}


def _is_larger(rng: Rng) -> dict:
    x, y = rng.sample(range(1, 41), 2)
    return {"x": x, "y": y, "answer": "yes" if x > y else "no", "is": "is" if x > y else "is not"}


def _opposite(rng: Rng) -> dict:
    pair = rng.pick(OPPOSITES)
    i = rng.below(2)
    return {"w": pair[i], "o": pair[1 - i], "answer": pair[1 - i].upper()}


def _members(rng: Rng, separator: str | None) -> dict:
    category, n = rng.pick(list(CATEGORIES)), rng.between(2, 4)
    words = rng.sample(CATEGORIES[category], n)
    return {
        "n": NUMBERS[n],
        "c": PLURALS[category],
        "answer": ", ".join(words) if separator else " ".join(words),
        "and": ", ".join(words[:-1]) + " and " + words[-1],
        "spec": {"category": category, "n": n, "separator": separator},
    }


def _sentence(rng: Rng) -> dict:
    x, y = rng.between(1, TOP), rng.between(1, TOP)
    return {"x": x, "y": y, "answer": f"{x} plus {y} is {x + y}."}


def _wrapped(before: str, after: str):
    def draw(rng: Rng) -> dict:
        word = rng.pick(WORDS)
        return {"w": word, "answer": before + word + after}

    return draw


SKILLS = (
    Skill(
        "json_person",
        _person,
        (
            "{n} is {g} years old. Write this as JSON with name and age.",
            "Give JSON with the keys name and age: {n} is {g}.",
            "Turn this into JSON with name and age: {n}, {g} years old.",
            "Name: {n}. Age: {g}. Answer as JSON.",
            "Make a JSON object with name {n} and age {g}.",
            "Please write name {n} and age {g} as JSON.",
            "As JSON with name and age: {n} is {g} years old.",
            "Answer in JSON with name and age.||{n} is {g} years old.",
        ),
        (
            "The file says {answer}, because {n} is {g} years old.",
            "{n} is {g} years old. As JSON, name and age are {answer}.",
            "In JSON, the name {n} and the age {g} are {answer}.",
        ),
        fact=lambda v: f"person:{v['n']},{v['g']}",
        kind="json",
        weight=1.3,
    ),
    Skill(
        "json_item",
        _object,
        (
            "The {w} is {c}. Write this as JSON with item and colour.",
            "Give JSON with the keys item and colour: a {c} {w}.",
            "Turn this into JSON with item and colour: {c} {w}.",
            "Item: {w}. Colour: {c}. Answer as JSON.",
            "Make a JSON object with item {w} and colour {c}.",
            "Please write item {w} and colour {c} as JSON.",
            "As JSON with item and colour: the {w} is {c}.",
            "Answer in JSON with item and colour.||The {w} is {c}.",
        ),
        (
            "The {w} is {c}, so the file says {answer}.",
            "The {c} {w} is written as {answer} in JSON.",
            "In JSON, the item {w} and the colour {c} are {answer}.",
        ),
        fact=lambda v: f"item:{v['w']},{v['c']}",
        kind="json",
    ),
    Skill(
        "json_list",
        _array,
        (
            "Write {l} as a JSON list.",
            "Give {and} as a JSON list.",
            "Make a JSON list of {l}.",
            "Turn {and} into a JSON list.",
            "Put {l} into a JSON list.",
            "Please write a JSON list with {and}.",
            "As a JSON list: {l}",
            "Answer with a JSON list.||{l}",
        ),
        ("As a JSON list, {l} is {answer}.", "The JSON list of {and} is {answer}."),
        fact=lambda v: f"array:{v['l']}",
        kind="json",
    ),
    Skill(
        "bullets",
        _bullets,
        (
            "Write {l} as a bullet list.",
            "Make a bullet list of {and}.",
            "Turn {l} into a bullet list.",
            "Give {and} as bullets, one a line.",
            "Put {l} into a list with bullets.",
            "Please make a bullet list: {l}",
            "As a bullet list, please: {and}",
            "Answer with a bullet list.||{l}",
        ),
        ("A bullet list of {and}:\n{answer}\n", "Things to bring, {l}, as bullets:\n{answer}\n"),
        fact=lambda v: f"bullets:{v['l']}",
        kind="lines",
    ),
    Skill(
        "numbered",
        _numbered,
        (
            "Write {l} as a numbered list.",
            "Make a numbered list of {and}.",
            "Turn {l} into a numbered list.",
            "Number these: {l}",
            "Put {l} into a numbered list.",
            "Please make a numbered list: {l}",
            "As a numbered list, please: {and}",
            "Answer with a numbered list.||{l}",
        ),
        ("A numbered list of {and}:\n{answer}\n", "The things {l}, numbered:\n{answer}\n"),
        fact=lambda v: f"numbered:{v['l']}",
        kind="lines",
    ),
    Skill(
        "is_a",
        _is_a,
        (
            "Is {w} {c}? Answer yes or no.",
            "Answer yes or no: is {w} {c}?",
            "Yes or no: is {w} {c}?",
            "Tell me with yes or no: is {w} {c}?",
            "Would you call {w} {c}? Yes or no.",
            "Only yes or no, please: is {w} {c}?",
            "I say that {w} is {c}. Is that right, yes or no?",
            "Answer only yes or no.||Is {w} {c}?",
        ),
        ("{w} {is} {c}.", "Is {w} {c}? People say {answer}: {w} {is} {c}.", "We know that {w} {is} {c}."),
        kind="yes_no",
        weight=1.2,
    ),
    Skill(
        "is_larger",
        _is_larger,
        (
            "Is {x} larger than {y}? Answer yes or no.",
            "Answer yes or no: is {x} larger than {y}?",
            "Yes or no: is {x} more than {y}?",
            "Tell me with yes or no: is {x} more than {y}?",
            "Only yes or no, please: is {x} larger than {y}?",
            "I say that {x} is larger than {y}. Is that right, yes or no?",
            "Is {x} more than {y}? Yes or no.",
            "Answer only yes or no.||Is {x} larger than {y}?",
        ),
        (
            "{x} {is} larger than {y}.",
            "Is {x} more than {y}? The answer is {answer}.",
            "{x} {is} more than {y}.",
        ),
        fact=lambda v: comparison_key(v["x"], v["y"]),
        kind="yes_no",
    ),
    Skill(
        "opposite",
        _opposite,
        (
            "What is the opposite of {w}? Answer in capital letters.",
            "In capital letters: the opposite of {w}.",
            "Write the opposite of {w} in capital letters.",
            "Give me the opposite of {w}, in capitals.",
            "Answer in capitals: what is the opposite of {w}?",
            "Capital letters only: which word is the opposite of {w}?",
            "Which word is the opposite of {w}? Use capital letters.",
            "Answer in capital letters.||What is the opposite of {w}?",
            "Use capital letters only.||Tell me the opposite of {w}.",
        ),
        (
            "The opposite of {w} is {o}.",
            "The opposite of {w} is {o}, in capital letters {answer}.",
            "{w} and {o} are opposites.",
            "Not {w} but {o}: the sign reads {answer}.",
        ),
        weight=1.2,
    ),
    Skill(
        "members",
        lambda rng: _members(rng, ","),
        (
            "Name {n} {c}, with commas.",
            "Give me {n} {c}, separated by commas.",
            "Write {n} {c} with commas between them.",
            "List exactly {n} {c}, with commas.",
            "Which {c} do you know? Name {n}, with commas.",
            "Tell me {n} {c}, separated by commas.",
            "I need {n} {c}. Use commas.",
            "Please name {n} {c}, with commas between them.",
            "Separate words by commas.||Name {n} {c}.",
        ),
        ("{and} are {n} {c}.", "{n} {c} are {answer}.", "Among the {c} are {and}."),
        kind="members",
        weight=0.6,
    ),
    Skill(
        "exactly",
        lambda rng: _members(rng, None),
        (
            "Answer with exactly {n} words, all of them {c}.",
            "Write exactly {n} words. Each must be one of the {c}.",
            "Exactly {n} words, please, only {c} and no commas.",
            "Use exactly {n} words: only {c}.",
            "Give {n} {c} in exactly {n} words.",
            "Say {n} words and no more, all {c}.",
            "I want exactly {n} words from you, all {c}.",
            "Answer in exactly {n} words.||Name some {c}.",
        ),
        (
            "The words {answer} are all {c}.",
            "Exactly {n} words, all {c}: {answer}.",
            "Only {c} here: {answer}.",
        ),
        kind="members",
        weight=0.6,
    ),
    Skill(
        "sentence",
        _sentence,
        (
            "Answer in one sentence: what is {x} plus {y}?",
            "What is {x} plus {y}? Answer in a whole sentence.",
            "In a full sentence, what is {x} plus {y}?",
            "Use a whole sentence to add {x} and {y}.",
            "Write one sentence that says what {x} plus {y} is.",
            "Say in a sentence how much {x} plus {y} is.",
            "Please answer in one sentence: how much is {x} plus {y}?",
            "Answer in whole sentences.||How much is {x} plus {y} in all?",
        ),
        ("Everybody knows: {answer}", "He wrote one sentence: {answer}", "{answer}"),
        weight=1.3,
    ),
    Skill(
        "quotes",
        _wrapped('"', '"'),
        (
            "Put {w} in double quotes.",
            "Write {w} in double quotes.",
            "Give me {w} with double quotes around it.",
            "Quote the word {w} with double quotes.",
            "Please put double quotes around {w}.",
            "Set {w} in double quotes.",
            "Wrap {w} in double quotes.",
            "Answer in double quotes.||Say {w}.",
        ),
        ("In double quotes, {w} is {answer}.", "The word {answer} stands in double quotes."),
        weight=0.5,
    ),
    Skill(
        "brackets",
        _wrapped("[", "]"),
        (
            "Put {w} in square brackets.",
            "Write {w} in square brackets.",
            "Give me {w} with square brackets around it.",
            "Please put square brackets around {w}.",
            "Set {w} in square brackets.",
            "Wrap {w} in square brackets.",
            "Use square brackets around {w}.",
            "Answer in square brackets.||Say the word {w}.",
        ),
        ("In square brackets, {w} is {answer}.", "The word {answer} stands in square brackets."),
        weight=0.5,
    ),
)


def generate(rng: Rng) -> Example:
    return ask("formats", draw_skill(SKILLS, rng), rng)


def reject(example: Example, rng: Rng) -> Message:
    return perturb(example, rng)


def text(rng: Rng) -> str:
    return tell(draw_skill(SKILLS, rng), rng)
