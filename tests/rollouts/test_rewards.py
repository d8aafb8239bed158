"""Every reward of the folder, and what each of them is about."""

import copy
import math
import random

import pytest

from lab_utils.data.tasks._base import families, family
from lab_utils.data.tokenizer import END_THINK, load_tokenizer
from lab_utils.errors import RecipeError
from lab_utils.models.generate import Sample
from lab_utils.recipe.objectives import RewardSource
from lab_utils.registry import load, members
from lab_utils.rollouts import rewards
from lab_utils.rollouts.rewards import Answer, get_reward, load_rewards

ROWS = [
    {
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "family": "arithmetic",
        "verify": {"family": "arithmetic", "kind": "exact", "expected": "4"},
        "tests": ["assert f(1) == 2"],
        "judgement": {"kind": "score", "label": 10},
    },
    {"messages": [{"role": "user", "content": "Say something."}], "family": "other"},
]
TEXTS = ["4", "5", "", "```python\ndef f(x):\n    return x + 1\n```", "Score: 10", "Verdict: A"]


def ask(prompts):
    return [f"Fine.\nScore: {1 + len(p[-1]['content']) % 10}" for p in prompts]


def answers(mode="chat"):
    return [
        Answer(t, list(range(9 * i)), i % 3 != 2, mode, "hm" * (mode != "chat")) for i, t in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("name", members("lab_utils.rollouts.rewards"))
def test_conformance(name):
    module = load("lab_utils.rollouts.rewards", name)
    assert module.REWARD.__doc__ and module.__doc__
    options = getattr(module, "EXAMPLE", {})
    (reward, weight) = load_rewards([RewardSource(name=name, weight=0.5, options=options)], ask=ask)[name]
    assert weight == 0.5
    assert reward.score([], []) == []
    for mode in ("chat", "thinking", "max"):
        given = [(row, answer) for row in ROWS for answer in answers(mode)]
        before = copy.deepcopy(given)
        scores = reward.score(*map(list, zip(*given)))
        assert given == before
        assert len(scores) == len(given) and all(isinstance(s, float) and not math.isinf(s) for s in scores)
        order = random.Random(1).sample(range(len(given)), len(given))
        again = reward.score([given[i][0] for i in order], [given[i][1] for i in order])
        assert [repr(s) for s in again] == [repr(scores[i]) for i in order]
    with pytest.raises(RecipeError, match="has no option 'nonsense'"):
        get_reward(name, {**options, "nonsense": 1}, ask=ask)


def test_unknown_and_unfit_options_are_refused_in_words():
    with pytest.raises(RecipeError, match="did you mean 'exact'"):
        get_reward("exactt")
    with pytest.raises(RecipeError, match="did you mean 'longest'"):
        get_reward("length", {"longst": 4, "margin": 2})
    with pytest.raises(RecipeError, match="needs its option 'margin'"):
        get_reward("length", {"longest": 4})
    with pytest.raises(RecipeError, match="margin=9 must lie"):
        get_reward("length", {"longest": 4, "margin": 9})
    with pytest.raises(RecipeError, match="no regular expression"):
        get_reward("format", {"pattern": "("})
    with pytest.raises(RecipeError, match="none to ask"):
        get_reward("judge")


def test_rewards_of_one_name_are_told_apart():
    sources = [RewardSource(name="format"), RewardSource(name="format", options={"pattern": "x"}, weight=2.0)]
    found = load_rewards(sources)
    assert list(found) == ["format", "format_2"] and found["format_2"][1] == 2.0
    assert found["format_2"][0].score(ROWS[:1], [Answer("x", [1], True)]) == [1.0]


@pytest.mark.parametrize("name", families())
def test_exact_agrees_with_the_shipped_answers(name):
    from lab_utils.data.manifest import load_manifest

    rows = [
        r for r in load_manifest("ascent-tasks-prompts").rows("validation") if r["verify"]["family"] == name
    ][:20]
    assert rows
    gold = [Answer(row["verify"]["expected"], [1], True) for row in rows if row["verify"]["kind"] == "exact"]
    exact = get_reward("exact")
    scores = exact.score([r for r in rows if r["verify"]["kind"] == "exact"], gold)
    assert scores == [1.0] * len(gold)
    assert exact.score(rows, [Answer("no idea at all", [1], True)] * len(rows)) == [0.0] * len(rows)
    assert family(name)


def test_exact_needs_an_ended_answer():
    row = ROWS[0]
    texts = [
        Answer("4", [1], True),
        Answer("4", [1], False),
        Answer("4", [1], True, "thinking", "", closed=False),
    ]
    assert get_reward("exact", {"wrong": -1.0}).score([row] * 3, texts) == [1.0, -1.0, -1.0]
    assert math.isnan(get_reward("exact").score([ROWS[1]], texts[:1])[0])


def test_format():
    right = get_reward("format", {"pattern": r"<a>.*</a>"})
    given = [
        (Answer("<a>x\ny</a>\n", [], True), 1.0),
        (Answer("<a>x</a> and more", [], True), 0.0),
        (Answer("<a>x</a>", [], False), 0.0),
        (Answer("<a>x</a>", [], True, "thinking", "so", closed=True), 1.0),
        (Answer("", [], True, "thinking", "<a>x</a>", closed=False), 0.0),
        (Answer(f"<a>{END_THINK}</a>", [], True, "thinking", "so"), 0.0),
    ]
    assert right.score([ROWS[1]] * len(given), [a for a, _ in given]) == [score for _, score in given]
    assert get_reward("format").score([ROWS[1]] * 2, [Answer(" ", [], True), Answer("a", [], True)]) == [
        0.0,
        1.0,
    ]


def test_length_is_dapos_slope():
    longest, margin = 20, 5
    reward = get_reward("length", {"longest": longest, "margin": margin})
    lengths = [0, 15, 16, 19, 20, 21, 100]
    # eq. 13 of the paper, by its three cases
    expected = [0.0 if n <= 15 else (15 - n) / 5 if n <= 20 else -1.0 for n in lengths]
    scores = reward.score([{}] * 7, [Answer("", [7] * n, True) for n in lengths])
    assert scores == pytest.approx(expected)
    by_mode = get_reward("length", {"longest": {"chat": 10, "max": 40}, "margin": 10})
    some = [Answer("", [7] * 35, True, mode) for mode in ("chat", "thinking", "max")]
    assert by_mode.score([{}] * 3, some) == pytest.approx([-1.0, 0.0, -0.5])


def test_code_runs_the_last_block():
    row = {"tests": ["assert f(2) == 3", "assert f(0) == 1"]}
    wrong, half = "def f(x):\n    return 0\n", "def f(x):\n    return 3\n"
    good = "First:\n```python\n" + wrong + "```\nBetter:\n```python\ndef f(x):\n    return x + 1\n```\nDone."
    texts = [good, half, wrong, "import os; os._exit(0)"]
    given = [Answer(text, [], True) for text in texts]
    assert get_reward("code").score([row] * 4, given) == [1.0, 0.0, 0.0, 0.0]
    assert get_reward("code", {"partial": True}).score([row] * 4, given) == [1.0, 0.5, 0.0, 0.0]
    cases = {"tests": [{"input": "1 2", "output": "3"}, {"input": "4 5", "output": "9\n"}]}
    program = Answer("```\nprint(sum(map(int, input().split())))\n```", [], True)
    assert get_reward("code").score([cases, {}], [program, program])[:1] == [1.0]


def test_judge_asks_once_for_all():
    calls = []

    def ask_once(prompts):
        calls.append(prompts)
        return ["Good.\nScore: 10", "Score: 1", "no score", "**Score: 4/10**"][: len(prompts)]

    judge = get_reward("judge", {"unparsed": 0.25}, ask=ask_once)
    scores = judge.score([ROWS[0]] * 4, [Answer(t, [], True) for t in "abcd"])
    assert scores == pytest.approx([1.0, 0.0, 0.25, 3 / 9])
    assert judge.score([], []) == [] and len(calls) == 2, "ranks without answers ask too"


def test_an_answer_is_split_at_the_token_that_ends_thinking():
    tokenizer = load_tokenizer()
    end, eos = tokenizer.special_id(END_THINK), tokenizer.eos_id
    hm, four = tokenizer.encode("hm, </think> spelt"), tokenizer.encode("4")
    sample = Sample([*hm, end, *four, eos], [0.0] * (len(hm) + len(four) + 2), True)
    answer = Answer.of(sample, "max", tokenizer)
    assert (answer.text, answer.reasoning, answer.closed) == ("4", "hm, </think> spelt", True)
    assert len(answer.tokens) == len(sample.tokens)
    never = Answer.of(Sample(hm, [0.0] * len(hm), False), "thinking", tokenizer)
    assert (never.text, never.closed, never.reasoning) == ("", False, "hm, </think> spelt")
    chat = Answer.of(Sample([*four, eos], [0.0, 0.0], True), "chat", tokenizer)
    assert (chat.text, chat.closed, chat.reasoning) == ("4", True, "")
    assert rewards.Answer is Answer
