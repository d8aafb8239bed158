"""Sums, differences, small products, doubles, halves, neighbours, comparisons: answers are bare numbers."""

from __future__ import annotations

from lab_utils.data.tasks._base import Example, Message, Skill, ask, draw_skill, exact, perturb, tell
from lab_utils.data.tasks._rng import Rng

verify = exact
# Largest operand of a sum or a difference: facts few enough to be told, so that a question is held out by its wording.
TOP = 20


def _sum(rng: Rng) -> dict:
    a, b = rng.between(1, TOP), rng.between(1, TOP)
    return {"a": a, "b": b, "answer": str(a + b)}


def _difference(rng: Rng) -> dict:
    a, b = rng.between(1, TOP), rng.between(1, TOP)
    a, b = max(a, b), min(a, b)
    return {"a": a, "b": b, "answer": str(a - b)}


def _product(rng: Rng) -> dict:
    a, b = rng.between(2, 9), rng.between(2, 9)
    return {"a": a, "b": b, "answer": str(a * b)}


def _three(rng: Rng) -> dict:
    a, b, c = rng.between(1, 5), rng.between(1, 5), rng.between(1, 5)
    return {"a": a, "b": b, "c": c, "answer": str(a + b + c)}


def _double(rng: Rng) -> dict:
    a = rng.between(2, 30)
    return {"a": a, "answer": str(2 * a)}


def _half(rng: Rng) -> dict:
    a = rng.between(1, 30)
    return {"a": 2 * a, "answer": str(a)}


def _neighbour(step: int):
    def draw(rng: Rng) -> dict:
        a = rng.between(2, 60)
        return {"a": a, "answer": str(a + step)}

    return draw


def _larger(rng: Rng) -> dict:
    a, b = rng.sample(range(1, 41), 2)
    return {"a": a, "b": b, "answer": str(max(a, b)), "other": str(min(a, b))}


def _smaller(rng: Rng) -> dict:
    a, b = rng.sample(range(1, 41), 2)
    return {"a": a, "b": b, "answer": str(min(a, b)), "other": str(max(a, b))}


def comparison_key(a: int, b: int) -> str:
    """Key of a pair that is compared, whatever is asked about it."""
    return f"compare:{min(a, b)},{max(a, b)}"


SKILLS = (
    Skill(
        "add",
        _sum,
        (
            "What is {a} plus {b}?",
            "What is {a} + {b}?",
            "{a} + {b} = ?",
            "Add {a} and {b}.",
            "Calculate {a} + {b}.",
            "What do you get if you add {b} to {a}?",
            "Please add {a} and {b}.",
            "How much is {a} plus {b}?",
            "Find the sum of {a} and {b}.",
            "Compute {a} plus {b}.",
            "Tell me the sum of {a} and {b}.",
            "Work out {a} + {b}.",
            "I need {a} + {b}.",
            "What does {a} plus {b} make?",
            "Sum: {a} and {b}.",
        ),
        (
            "{a} plus {b} is {answer}.",
            "{a} + {b} = {answer}.",
            "{a} plus {b} makes {answer}.",
            "The sum of {a} and {b} is {answer}.",
            "If you add {b} to {a}, you get {answer}.",
            "Add {a} and {b} and you have {answer}.",
            "{a} and {b} together are {answer}.",
        ),
        weight=3,
        reason="{a} + {b} = {answer}.",
    ),
    Skill(
        "sub",
        _difference,
        (
            "What is {a} minus {b}?",
            "What is {a} - {b}?",
            "{a} - {b} = ?",
            "Subtract {b} from {a}.",
            "Calculate {a} - {b}.",
            "Take {b} away from {a}.",
            "How much is {a} minus {b}?",
            "Please subtract {b} from {a}.",
            "Find the difference of {a} and {b}.",
            "Compute {a} minus {b}.",
            "Work out {a} - {b}.",
            "What is left if you take {b} from {a}?",
        ),
        (
            "{a} minus {b} is {answer}.",
            "{a} - {b} = {answer}.",
            "{a} minus {b} leaves {answer}.",
            "The difference of {a} and {b} is {answer}.",
            "If you take {b} from {a}, {answer} is left.",
            "Subtract {b} from {a} and you have {answer}.",
        ),
        weight=2.5,
        reason="{a} - {b} = {answer}.",
    ),
    Skill(
        "mul",
        _product,
        (
            "What is {a} times {b}?",
            "What is {a} * {b}?",
            "{a} * {b} = ?",
            "Multiply {a} by {b}.",
            "Calculate {a} * {b}.",
            "How much is {a} times {b}?",
            "Please multiply {a} by {b}.",
            "Find the product of {a} and {b}.",
            "Compute {a} times {b}.",
            "Work out {a} * {b}.",
            "Tell me {a} times {b}.",
            "What do {a} times {b} make?",
        ),
        (
            "{a} times {b} is {answer}.",
            "{a} * {b} = {answer}.",
            "{a} times {b} makes {answer}.",
            "The product of {a} and {b} is {answer}.",
            "Multiply {a} by {b} and you get {answer}.",
        ),
        weight=1.5,
    ),
    Skill(
        "add3",
        _three,
        (
            "What is {a} plus {b} plus {c}?",
            "What is {a} + {b} + {c}?",
            "{a} + {b} + {c} = ?",
            "Add {a}, {b} and {c}.",
            "Calculate {a} + {b} + {c}.",
            "Find the sum of {a}, {b} and {c}.",
            "Please add {a}, {b} and {c}.",
            "How much is {a} plus {b} plus {c}?",
        ),
        (
            "{a} plus {b} plus {c} is {answer}.",
            "{a} + {b} + {c} = {answer}.",
            "The sum of {a}, {b} and {c} is {answer}.",
            "Add {a}, {b} and {c} and you have {answer}.",
        ),
    ),
    Skill(
        "double",
        _double,
        (
            "What is the double of {a}?",
            "Double {a}.",
            "What is twice {a}?",
            "Please double the number {a}.",
            "How much is two times {a}?",
            "Give me twice {a}.",
            "What do you get if you double {a}?",
            "Find the double of {a}.",
        ),
        (
            "The double of {a} is {answer}.",
            "Twice {a} is {answer}.",
            "Double {a} and you get {answer}.",
            "Two times {a} makes {answer}.",
        ),
        weight=0.8,
    ),
    Skill(
        "half",
        _half,
        (
            "What is half of {a}?",
            "Halve {a}.",
            "What do you get if you halve {a}?",
            "Please give me half of {a}.",
            "How much is half of {a}?",
            "Find half of {a}.",
            "Tell me the half of {a}.",
            "Divide {a} by two.",
        ),
        (
            "Half of {a} is {answer}.",
            "Halve {a} and you get {answer}.",
            "The half of {a} is {answer}.",
            "{a} divided by two is {answer}.",
        ),
        weight=0.8,
    ),
    Skill(
        "after",
        _neighbour(1),
        (
            "Which number comes after {a}?",
            "What comes right after {a}?",
            "Count one up from {a}.",
            "Which number follows {a}?",
            "Tell me the next number after {a}.",
            "What is one more than {a}?",
            "Give the number after {a}.",
            "I count to {a}. What is next?",
        ),
        (
            "After {a} comes {answer}.",
            "The number after {a} is {answer}.",
            "{a} is followed by {answer}.",
            "One more than {a} is {answer}.",
        ),
        weight=0.6,
    ),
    Skill(
        "before",
        _neighbour(-1),
        (
            "Which number comes before {a}?",
            "What comes right before {a}?",
            "Count one down from {a}.",
            "Which number stands before {a}?",
            "Tell me the number before {a}.",
            "What is one less than {a}?",
            "Give the number before {a}.",
            "I count down to {a}. What is next?",
        ),
        (
            "Before {a} comes {answer}.",
            "The number before {a} is {answer}.",
            "{answer} stands right before {a}.",
            "One less than {a} is {answer}.",
        ),
        weight=0.6,
    ),
    Skill(
        "larger",
        _larger,
        (
            "Which is larger, {a} or {b}?",
            "Which number is bigger: {a} or {b}?",
            "What is the larger one of {a} and {b}?",
            "Is {a} or {b} larger?",
            "Tell me the larger number: {a} or {b}.",
            "Give me the bigger of {a} and {b}.",
            "{a} or {b}: which is more?",
            "Pick the larger number, {a} or {b}.",
        ),
        (
            "{answer} is larger than {other}.",
            "The larger one of {a} and {b} is {answer}.",
            "Of {a} and {b}, {answer} is bigger.",
            "{answer} is more than {other}.",
        ),
        fact=lambda v: comparison_key(v["a"], v["b"]),
        weight=0.8,
    ),
    Skill(
        "smaller",
        _smaller,
        (
            "Which is smaller, {a} or {b}?",
            "Which number is less: {a} or {b}?",
            "What is the smaller one of {a} and {b}?",
            "Is {a} or {b} smaller?",
            "Tell me the smaller number: {a} or {b}.",
            "Give me the smaller of {a} and {b}.",
            "{a} or {b}: which is less?",
            "Pick the smaller number, {a} or {b}.",
        ),
        (
            "{answer} is smaller than {other}.",
            "The smaller one of {a} and {b} is {answer}.",
            "Of {a} and {b}, {answer} is smaller.",
            "{answer} is less than {other}.",
        ),
        fact=lambda v: comparison_key(v["a"], v["b"]),
        weight=0.8,
    ),
)


def generate(rng: Rng) -> Example:
    return ask("arithmetic", draw_skill(SKILLS, rng), rng)


def reject(example: Example, rng: Rng) -> Message:
    return perturb(example, rng)


def text(rng: Rng) -> str:
    return tell(draw_skill(SKILLS, rng), rng)
