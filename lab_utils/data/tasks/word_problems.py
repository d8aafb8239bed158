"""One-step stories with names and two small numbers: more, fewer, together, groups, shares, ages."""

from __future__ import annotations

from lab_utils.data.tasks._base import Example, Message, Skill, ask, draw_skill, exact, perturb, tell
from lab_utils.data.tasks._rng import Rng
from lab_utils.data.tasks._words import ITEMS, NAMES
from lab_utils.data.tasks.arithmetic import TOP

verify = exact


def _people(rng: Rng, values: dict) -> dict:
    n, m = rng.sample(NAMES, 2)
    return {"n": n, "m": m, "i": rng.pick(ITEMS), **values}


def _more(rng: Rng) -> dict:
    a, b = rng.between(2, TOP), rng.between(2, TOP)
    return _people(rng, {"a": a, "b": b, "answer": str(a + b)})


def _fewer(rng: Rng) -> dict:
    a, b = rng.sample(range(2, TOP + 1), 2)
    a, b = max(a, b), min(a, b)
    return _people(rng, {"a": a, "b": b, "answer": str(a - b)})


def _times(rng: Rng) -> dict:
    a, b = rng.between(2, 9), rng.between(2, 9)
    return _people(rng, {"a": a, "b": b, "answer": str(a * b)})


def _share(rng: Rng) -> dict:
    a, b = rng.between(2, 9), rng.between(2, 9)
    return _people(rng, {"a": a * b, "b": b, "answer": str(a)})


SKILLS = (
    Skill(
        "gets",
        _more,
        (
            "{n} has {a} {i} and gets {b} more. How many {i} does {n} have now?",
            "{n} had {a} {i}. {m} gave {n} {b} more. How many {i} does {n} have?",
            "{n} buys {a} {i} and then {b} more. How many {i} is that in all?",
            "There are {a} {i} in a box. {n} puts in {b} more. How many are in the box now?",
            "{n} found {a} {i} in the morning and {b} in the evening. How many did {n} find?",
            "On Monday {n} counts {a} {i}, on Tuesday {b}. How many is that together?",
        ),
        (
            "{n} has {a} {i} and gets {b} more, so now {n} has {answer} {i}.",
            "{n} had {a} {i}. {m} gave {n} {b} more, and then there were {answer}.",
            "{n} bought {a} {i} and then {b} more, which is {answer} in all.",
            "There were {a} {i} in a box. {n} put in {b} more. Now there are {answer} in the box.",
            "{n} found {a} {i} in the morning and {b} in the evening: {answer} that day.",
        ),
        weight=1.5,
        reason="{a} + {b} = {answer}.",
    ),
    Skill(
        "together",
        _more,
        (
            "{n} has {a} {i} and {m} has {b}. How many {i} do they have together?",
            "{n} and {m} count their {i}. {n} has {a}, {m} has {b}. How many is that in all?",
            "{n} brings {a} {i} and {m} brings {b}. How many {i} do they bring together?",
            "In one bag are {a} {i}, in another {b}. How many {i} are in both bags?",
            "{n} picked {a} {i}, {m} picked {b}. How many {i} did they pick together?",
        ),
        (
            "{n} has {a} {i} and {m} has {b}, so together they have {answer}.",
            "{n} and {m} count their {i}. {n} has {a}, {m} has {b}, and that is {answer} in all.",
            "{n} brings {a} {i} and {m} brings {b}. Together they bring {answer} {i}.",
            "In one bag are {a} {i}, in another {b}; both bags hold {answer}.",
        ),
        reason="{a} + {b} = {answer}.",
    ),
    Skill(
        "loses",
        _fewer,
        (
            "{n} has {a} {i} and gives {b} to {m}. How many {i} does {n} have left?",
            "{n} had {a} {i} and lost {b}. How many are left?",
            "There are {a} {i} on the table. {n} takes {b}. How many {i} are left?",
            "{n} has {a} {i} and sells {b} of them. How many {i} does {n} keep?",
            "A shop has {a} {i}. {n} buys {b}. How many {i} are left in the shop?",
            "{n} packs {a} {i} and takes {b} out again. How many {i} stay in the bag?",
        ),
        (
            "{n} has {a} {i} and gives {b} to {m}, so {n} has {answer} left.",
            "{n} had {a} {i} and lost {b}. Now {answer} are left.",
            "There were {a} {i} on the table. {n} took {b}, and {answer} {i} were left.",
            "{n} had {a} {i} and sold {b} of them, so {n} kept {answer}.",
            "A shop has {a} {i}. {n} buys {b}, and {answer} {i} are left in the shop.",
        ),
        weight=1.5,
        reason="{a} - {b} = {answer}.",
    ),
    Skill(
        "difference",
        _fewer,
        (
            "{n} has {a} {i} and {m} has {b}. How many more {i} does {n} have?",
            "{n} is {a} years old and {m} is {b}. How many years older is {n}?",
            "{n} needs {a} {i} and has {b}. How many {i} are missing?",
            "{n} read {a} pages and {m} read {b}. How many more pages did {n} read?",
            "{n} wants {a} {i}, but has only {b}. How many more are needed?",
        ),
        (
            "{n} has {a} {i} and {m} has {b}, so {n} has {answer} more.",
            "{n} is {a} years old and {m} is {b}: {n} is {answer} years older.",
            "{n} needs {a} {i} and has {b}, so {answer} are missing.",
            "{n} read {a} pages and {m} read {b}, which is {answer} fewer.",
        ),
        reason="{a} - {b} = {answer}.",
    ),
    Skill(
        "groups",
        _times,
        (
            "{n} has {a} bags with {b} {i} each. How many {i} is that?",
            "There are {a} boxes with {b} {i} in each. How many {i} are there?",
            "{n} buys {a} packs of {b} {i}. How many {i} does {n} buy?",
            "{n} gives {b} {i} to each of {a} friends. How many {i} does {n} give away?",
            "On {a} plates are {b} {i} each. How many {i} are there?",
            "{n} reads {b} pages a day for {a} days. How many pages is that?",
        ),
        (
            "{n} has {a} bags with {b} {i} each, which is {answer} {i}.",
            "There are {a} boxes with {b} {i} in each, so there are {answer} {i}.",
            "{n} buys {a} packs of {b} {i} and has {answer}.",
            "{n} gives {b} {i} to each of {a} friends, {answer} in all.",
            "{n} reads {b} pages a day for {a} days, and that is {answer} pages.",
        ),
        weight=1.3,
        reason="{a} * {b} = {answer}.",
    ),
    Skill(
        "share",
        _share,
        (
            "{n} shares {a} {i} equally among {b} friends. How many does each friend get?",
            "{a} {i} are put into {b} bags, the same number in each. How many are in one bag?",
            "{b} children share {a} {i} equally. How many {i} does each child get?",
            "{n} puts {a} {i} on {b} plates, the same on each. How many are on one plate?",
            "{n} packs {a} {i} into {b} boxes, equally. How many {i} are in a box?",
        ),
        (
            "{n} shares {a} {i} equally among {b} friends, and each gets {answer}.",
            "{a} {i} are put into {b} bags, the same number in each: {answer} in one bag.",
            "{b} children share {a} {i} equally, so each child gets {answer}.",
            "{n} packs {a} {i} into {b} boxes, equally, and {answer} go into each.",
            "{a} divided by {b} is {answer}.",
        ),
        reason="{a} / {b} = {answer}.",
    ),
)


def generate(rng: Rng) -> Example:
    return ask("word_problems", draw_skill(SKILLS, rng), rng)


def reject(example: Example, rng: Rng) -> Message:
    return perturb(example, rng)


def text(rng: Rng) -> str:
    return tell(draw_skill(SKILLS, rng), rng)
