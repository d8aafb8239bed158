"""Every family of tasks, by one set of rules: verifiers, determinism, splits, held-out facts."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.data import generated
from lab_utils.data.encoding import render
from lab_utils.data.tasks import Example, Rng, families, family, split_of, tools, verify_row
from lab_utils.data.tasks._base import held_out, normalise
from lab_utils.data.tasks._compose import examples, question
from lab_utils.data.tasks._words import CATEGORIES, WORDS
from lab_utils.data.tasks.arithmetic import comparison_key
from lab_utils.data.tokenizer import END_THINK, EOS

# What Rng(2024) draws, below.
FROZEN = [470, 8, "b", [7, 4, 0, 1], True]
SEEDS = st.integers(0, 2**40)


def completion(message: dict) -> str:
    """What a model would have to write to give this message."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return message["content"] + "".join(
        tools.render_call(f["name"], json.loads(f["arguments"])) for f in calls
    )


def as_row(example: Example) -> dict:
    """Through JSON, as a shipped file stores it."""
    row = {"messages": example.messages, "tools": example.tools, "verify": example.spec}
    return json.loads(json.dumps(row))


def test_the_shipped_families_are_found():
    known = {"arithmetic", "formats", "lists", "safety", "strings", "tools", "units", "word_problems"}
    assert known <= set(families())


@pytest.mark.parametrize("name", families())
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_gold_is_accepted_and_rejected_is_not(name, seed):
    rng = Rng(seed)
    module = family(name)
    example = module.generate(rng)
    gold, bad = completion(example.answer), module.reject(example, rng)
    assert example.family == example.spec["family"] == name
    assert example.messages[-1]["role"] in ("user", "tool")
    assert module.verify(example, gold)
    assert verify_row(as_row(example), gold)
    assert bad["role"] == "assistant" and not module.verify(example, completion(bad))


@pytest.mark.parametrize("name", families())
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_verifiers_forgive_whitespace_only(name, seed):
    module = family(name)
    example = module.generate(Rng(seed))
    gold = completion(example.answer)
    assert module.verify(example, f"  {gold}\n")
    for bad in (
        "",
        " ",
        gold + " " + gold + " and more of it, which nobody asked for at all.",
        "x" + gold,
        gold[:-3],
    ):
        if bad.strip() != gold.strip().rstrip("."):
            assert not module.verify(example, bad), (example.messages, bad)


@pytest.mark.parametrize("name", families())
def test_no_family_is_stuck_on_one_wording(name):
    rng = Rng(5)
    asked = {question(family(name).generate(rng)) for _ in range(300)}
    shapes = {re.sub(r"\d+|\b(" + "|".join(WORDS) + r")\b", "_", q) for q in asked}
    assert len(asked) > 200 and len(shapes) > 40


@pytest.mark.parametrize("name", families())
def test_a_wording_of_each_skill_has_enough_variants(name):
    for skill in getattr(family(name), "SKILLS", ()):
        stories = name == "word_problems"
        assert len(set(skill.asks)) == len(skill.asks) >= (5 if stories else 8), skill.name


def test_wrong_tool_arguments_and_types_fail():
    spec = {"family": "tools", "kind": "call"}
    call = {"name": "light", "arguments": {"room": "hall", "on": True}}
    example = Example("tools", (), {}, {**spec, "expected": json.dumps(call)}, "")
    assert tools.verify(example, tools.render_call("light", {"on": True, "room": "hall"}))
    for name, arguments in (
        ("lamp", {"room": "hall", "on": True}),
        ("light", {"room": "hall", "on": 1}),
        ("light", {"room": "hall", "on": "true"}),
        ("light", {"room": "hall"}),
        ("light", {"room": "hall", "on": True, "extra": 1}),
    ):
        assert not tools.verify(example, tools.render_call(name, arguments))
    good = tools.render_call("light", {"room": "hall", "on": True})
    assert not tools.verify(example, "Sure." + good)
    assert not tools.verify(example, good.replace("</｜DSML｜invoke>", ""))


def test_any_members_of_the_category_are_right():
    spec = {"kind": "members", "category": "animal", "n": 3, "separator": ",", "expected": "cat, dog, cow"}
    example = Example("formats", (), {}, {"family": "formats", **spec}, "")
    assert family("formats").verify(example, "owl, bee, fox.")
    for bad in ("owl, bee", "owl, owl, bee", "owl, bee, bus", "owl bee fox", "owl, bee, fox, cat"):
        assert not family("formats").verify(example, bad)


def test_refusing_the_harmless_and_helping_the_harmful_both_fail():
    safety = family("safety")
    refuse = Example("safety", (), {}, {"family": "safety", "kind": "refuse", "expected": safety.REFUSAL}, "")
    benign = Example(
        "safety", (), {}, {"family": "safety", "kind": "answer", "expected": "Press the switch."}, ""
    )
    assert safety.verify(refuse, "I'm sorry, I can't help with that")
    assert not safety.verify(
        refuse, "Sorry, I can't help with that. But first you take a long rope and a good bag."
    )
    assert not safety.verify(refuse, "Press the switch.")
    assert not safety.verify(benign, safety.REFUSAL)


def test_categories_are_disjoint():
    members = [word for words in CATEGORIES.values() for word in words]
    assert len(members) == len(set(members))


@given(key=st.text())
@settings(max_examples=50, deadline=None)
def test_a_key_has_one_split(key):
    assert split_of(key) in ("train", "validation", "test")
    assert held_out(key) == (split_of(key) != "train")


def test_shares_of_the_key_space():
    splits = [split_of(f"add:{a}+{b}") for a in range(1, 100) for b in range(a, 100)]
    assert 0.04 < splits.count("test") / len(splits) < 0.06
    assert 0.03 < splits.count("validation") / len(splits) < 0.05


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tasks_messages", {"split": "train", "rows": 60}),
        ("tasks_preference", {"split": "test", "rows": 24, "balanced": True}),
        ("tasks_prompts", {"split": "validation", "rows": 24}),
        ("tasks_text", {"split": "train", "rows": 40}),
    ],
)
def test_the_same_seed_gives_the_same_bytes(name, arguments, tmp_path):
    first = generated.write_jsonl(tmp_path / "a.jsonl", name, arguments, 7)
    second = generated.write_jsonl(tmp_path / "b.jsonl", name, arguments, 7)
    other = generated.write_jsonl(tmp_path / "c.jsonl", name, arguments, 8)
    assert first == second and first["rows"] == arguments["rows"]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert first["sha256"] != other["sha256"]


def test_random_choices_do_not_depend_on_the_library_version():
    """Frozen values: a change here changes every shipped hash."""
    rng = Rng(2024)
    drawn = [rng.below(1000), rng.between(5, 9), rng.pick("abcdef"), rng.sample(range(9), 4), rng.chance(0.5)]
    assert drawn == FROZEN


def test_unknown_generators_and_arguments_are_named():
    from lab_utils.errors import DataError

    with pytest.raises(DataError, match="tasks_text"):
        generated.rows("tasks_txt", {}, 0)
    with pytest.raises(DataError, match="split"):
        generated.rows("tasks_text", {"spilt": "train", "rows": 3}, 0)


def test_the_text_tells_no_held_out_comparison():
    texts = [row["text"] for row in generated.rows("tasks_text", {"split": "train", "rows": 3000}, 3)]
    pairs = [m for t in texts for m in re.findall(r"(?:larger|smaller) one of (\d+) and (\d+) is", t)]
    assert len(pairs) > 40
    assert not [p for p in pairs if held_out(comparison_key(int(p[0]), int(p[1])))]


def test_the_text_has_no_chat_form():
    for row in generated.rows("tasks_text", {"split": "train", "rows": 500}, 4):
        assert "｜" not in row["text"] and "<" not in row["text"]
        assert not re.search(r"(?im)^(user|assistant|question|answer|q|a):", row["text"])


def test_earlier_turns_stay_in_the_split():
    turns = 0
    for example in examples(Rng(11), "test", 200, balanced=True):
        users = [m["content"] for m in example.messages if m["role"] == "user"]
        turns += len(users) > 1
        assert example.split == "test"
    assert turns > 5


def test_a_comparison_has_one_key_in_either_order():
    assert comparison_key(38, 17) == comparison_key(17, 38) == "compare:17,38"


def test_normalise_ignores_case_and_punctuation():
    assert normalise("What is 4 + 5?") == normalise("what is 4 + 5") != normalise("what is 4 - 5")


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_calls_are_read_as_the_chat_encoding_writes_them(seed):
    example = family("tools").generate(Rng(seed))
    tail = render([*example.messages, example.answer], tools=example.tools).rpartition(END_THINK)[2]
    assert tail == completion(example.answer) + EOS
    assert family("tools").verify(example, tail.removesuffix(EOS))
