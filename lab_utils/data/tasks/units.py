"""Whole-number conversions from a small table: lengths, weights, volumes, times, dozens."""

from __future__ import annotations

from lab_utils.data.tasks._base import Example, Message, Skill, ask, draw_skill, exact, perturb, tell
from lab_utils.data.tasks._rng import Rng

verify = exact

# (large unit singular, plural, short), (small unit plural, short), factor, largest count of the large unit
TABLE = (
    (("metre", "metres", "m"), ("centimetres", "cm"), 100, 20),
    (("kilometre", "kilometres", "km"), ("metres", "m"), 1000, 20),
    (("centimetre", "centimetres", "cm"), ("millimetres", "mm"), 10, 20),
    (("kilogram", "kilograms", "kg"), ("grams", "g"), 1000, 20),
    (("litre", "litres", "l"), ("millilitres", "ml"), 1000, 20),
    (("hour", "hours", "h"), ("minutes", "min"), 60, 12),
    (("minute", "minutes", "min"), ("seconds", "s"), 60, 12),
    (("day", "days", None), ("hours", None), 24, 7),
    (("week", "weeks", None), ("days", None), 7, 12),
    (("year", "years", None), ("months", None), 12, 10),
    (("dozen", "dozen", None), ("pieces", None), 12, 10),
)
DECIMAL = (10, 100, 1000)
WEIGHTS = [1.4 if row[2] in DECIMAL else 1.0 for row in TABLE]


def _values(rng: Rng, down: bool) -> dict:
    (one, many, short), (small, small_short), factor, top = rng.weighted(TABLE, WEIGHTS)
    n = rng.between(1, top)
    large = one if n == 1 else many
    if short and rng.chance(0.25):
        large = many = short
        small = small_short
    a, x, b, y = (n, large, n * factor, small) if down else (n * factor, small, n, many)
    return {"a": a, "x": x, "y": y, "answer": str(b), "z": small if down else large}


ASKS = (
    "How many {y} are {a} {x}?",
    "Convert {a} {x} to {y}.",
    "What is {a} {x} in {y}?",
    "How many {y} are there in {a} {x}?",
    "Change {a} {x} into {y}.",
    "{a} {x} is how many {y}?",
    "Express {a} {x} in {y}.",
    "Give {a} {x} in {y}.",
    "I have {a} {x}. How many {y} is that?",
    "Please convert {a} {x} to {y}.",
    "{a} {x} = ? {y}",
    "Tell me what {a} {x} makes in {y}.",
)
TELLS = (
    "{a} {x} is {answer} {z}.",
    "{a} {x} makes {answer} {z}.",
    "{a} {x} = {answer} {z}.",
    "There are {answer} {z} in {a} {x}.",
    "Convert {a} {x} to {y} and you get {answer}.",
    "In {y}, {a} {x} is {answer}.",
)

SKILLS = (
    Skill("down", lambda rng: _values(rng, True), ASKS, TELLS, weight=1.2),
    Skill("up", lambda rng: _values(rng, False), ASKS, TELLS),
)


def generate(rng: Rng) -> Example:
    return ask("units", draw_skill(SKILLS, rng), rng)


def reject(example: Example, rng: Rng) -> Message:
    return perturb(example, rng)


def text(rng: Rng) -> str:
    return tell(draw_skill(SKILLS, rng), rng)
