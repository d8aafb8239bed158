"""The endless sequence of prompts: reproducible, resumable, weighted, in the modes that were asked for."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.data.documents import Encoding
from lab_utils.data.encoding import render
from lab_utils.data.fixed_texts import FixedTexts
from lab_utils.data.tokenizer import END_THINK, THINK, load_tokenizer
from lab_utils.errors import DataError
from lab_utils.recipe import Recipe
from lab_utils.rollouts.prompts import Prompts, build_prompts, prompt_ids

ENCODING = Encoding(load_tokenizer())


def rows(count: int, name: str = "q") -> list[dict]:
    return [{"messages": [{"role": "user", "content": f"{name} {i}"}], "family": name} for i in range(count)]


def seen(prompts):
    return [p.row["messages"][0]["content"] for p in prompts]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.lists(st.integers(0, 13), max_size=6))
def test_takes_of_any_size_give_one_sequence(n, m, seed, takes):
    make = lambda: Prompts([rows(n, "a"), rows(m, "b")], ENCODING, seed=seed, modes=("chat", "thinking"))  # noqa: E731
    whole, pieces = make().take(sum(takes) + 5), make()
    parts = [p for take in takes for p in pieces.take(take)]
    resumed = make()
    resumed.load_state_dict(pieces.state_dict())
    parts += resumed.take(5)
    assert parts == whole
    assert [p.index for p in whole] == list(range(len(whole)))
    assert [p.mode for p in whole] == [("chat", "thinking")[i % 2] for i in range(len(whole))]
    assert resumed.position == len(whole)


def test_an_epoch_has_every_row_once_in_another_order():
    prompts = Prompts([rows(20), rows(7, "b")], ENCODING, seed=1)
    first, second = seen(prompts.take(27)), seen(prompts.take(27))
    assert prompts.epoch == 2.0
    assert (
        sorted(first)
        == sorted(second)
        == sorted(seen(Prompts([rows(20), rows(7, "b")], ENCODING, seed=2).take(27)))
    )
    assert first != second
    assert seen(Prompts([rows(3)], ENCODING, seed=1, shuffle=False).take(5)) == [
        "q 0",
        "q 1",
        "q 2",
        "q 0",
        "q 1",
    ]


def test_weights_are_passes_over_a_source():
    prompts = Prompts([rows(10, "a"), rows(4, "b")], ENCODING, seed=5, weights=[0.5, 3.0])
    first, second = seen(prompts.take(17)), seen(prompts.take(17))
    for epoch in (first, second):
        assert Counter(text[0] for text in epoch) == {"a": 5, "b": 12}
        assert set(Counter(t for t in epoch if t[0] == "b").values()) == {3}
    assert len({t for t in first + second if t[0] == "a"}) == 10, "the second half in the second epoch"


def test_a_place_in_other_data_is_refused():
    state = Prompts([rows(5)], ENCODING, seed=1).state_dict()
    others = [
        Prompts([rows(6)], ENCODING, seed=1),
        Prompts([rows(5, "z")], ENCODING, seed=1),
        Prompts([rows(5)], ENCODING, seed=2),
        Prompts([rows(5)], ENCODING, seed=1, modes=("max",)),
        Prompts([rows(5)], ENCODING, seed=1, weights=[2.0]),
    ]
    for other in others:
        with pytest.raises(DataError, match="resume with the same manifests"):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="An epoch of the prompts is empty"):
        Prompts([rows(3)], ENCODING, seed=1, weights=[0.2])


def test_modes_are_encoded_as_the_format_has_them():
    row, tokenizer = rows(1)[0], ENCODING.tokenizer
    chat, thinking, most = (prompt_ids(ENCODING, row, mode) for mode in ("chat", "thinking", "max"))
    assert chat[-1] == tokenizer.special_id(END_THINK)
    assert thinking[-1] == most[-1] == tokenizer.special_id(THINK)
    effort = FixedTexts.shipped().max_effort
    assert effort in tokenizer.decode(most) and effort not in tokenizer.decode(thinking)
    assert tokenizer.decode(most) == render(row["messages"], mode="thinking", effort="max")
    assert tokenizer.decode(chat) == render(row["messages"], mode="chat")


def recipe(**changes):
    tree = {
        "model": {"source": "preset:v4-tiny"},
        "data": {"train": [{"manifest": "ascent-tasks-prompts", "split": "validation"}]},
        "objective": {"kind": "grpo"},
        "rollout": {"modes": ["thinking", "max"]},
    }
    return Recipe.model_validate({**tree, **changes})


def test_a_recipe_says_which_prompts():
    prompts = build_prompts(recipe(), load_tokenizer())
    drawn = prompts.take(6)
    assert [p.mode for p in drawn] == ["thinking", "max"] * 3
    assert all(p.row["verify"]["family"] for p in drawn)
    assert prompts.pad_id == load_tokenizer().eos_id
    assert [p.mode for p in build_prompts(recipe(rollout={}), load_tokenizer()).take(2)] == ["chat", "chat"]
    with pytest.raises(DataError, match="has format messages, but sampling needs prompt"):
        build_prompts(recipe(data={"train": [{"manifest": "ascent-tasks-sft"}]}), load_tokenizer())
