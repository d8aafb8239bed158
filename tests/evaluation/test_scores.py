"""From answers and likelihoods to measures: what counts where, and why a measure is missing."""

import math

import pytest
from stand_ins import BENIGN, UNSAFE, answer, question

from lab_utils.data.columns import family_of
from lab_utils.evaluation import scores as s
from lab_utils.evaluation import statistics
from lab_utils.evaluation.held_out import HeldOut
from lab_utils.evaluation.likelihood import Likelihood, PairLikelihood
from lab_utils.evaluation.pairwise import exact_verdicts, win_rate


def held(*rows, format="prompt", name="set"):
    return HeldOut(name, "test", format, list(rows), [family_of(row) or name for row in rows])


def pair(chosen, rejected, tokens=(2, 2)):
    return PairLikelihood(Likelihood(chosen, tokens[0]), Likelihood(rejected, tokens[1]))


def test_refusal_and_over_refusal_are_counted_on_their_own_questions():
    rows = [UNSAFE, UNSAFE, BENIGN, BENIGN, question()]
    texts = ["Sorry, I can't help with that.", "Sure!", "Sorry, no.", "Tap it on a bowl.", "I cannot add."]
    found = s.scores([held(*rows)], s.Findings({"chat": [answer(text) for text in texts]}))
    assert found["refusal_rate"] == statistics.proportion([1, 0], ["safety", "safety"])
    assert found["over_refusal_rate"] == statistics.proportion([1, 0], ["safety", "safety"])
    assert found["exact_match"]["value"] == 2 / 5
    assert found["exact_match"]["by_family"]["arithmetic"]["n"] == 1


def test_questions_of_several_manifests_are_one_set():
    parts = [
        held(question(), name="a"),
        held({"text": "x"}, format="text"),
        held(question("3?", "3"), name="b"),
    ]
    assert s.Questions.of(parts).sources == ["a", "b"]
    found = s.scores(parts, s.Findings({"chat": [answer("2"), answer("4")]}))
    assert (found["exact_match"]["value"], found["exact_match"]["n"]) == (0.5, 2)


def test_a_question_without_a_verifier_counts_into_no_exact_match():
    plain = {"messages": [{"role": "user", "content": "Hello"}]}
    found = s.scores([held(plain, question())], s.Findings({"chat": [answer("Hi"), answer("2")]}))
    assert found["exact_match"]["n"] == 1 and found["completion_length"]["n"] == 2


def test_pass_at_k_is_given_for_every_k_and_leads_with_the_largest():
    rows = [question(), question("2?"), question("3?")]
    drawn = [[answer("2" if i < right else "7") for i in range(4)] for right in (0, 1, 4)]
    found = s.pass_at_k(s.Questions.of([held(*rows)]), drawn, [1, 2])
    assert (found["k"], found["samples"]) == (2, 4)
    assert found["value"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert found["by_k"]["1"]["value"] == pytest.approx((0 + 1 / 4 + 1) / 3)


def test_each_mode_has_its_own_numbers_and_the_first_leads():
    right, wrong = [answer("2", 3)], [answer("", 9, finished=False)]
    found = s.scores([held(question())], s.Findings({"chat": right, "thinking": wrong}))
    assert found["exact_match"]["value"] == 1 and set(found["by_mode"]) == {"chat", "thinking"}
    thinking = found["by_mode"]["thinking"]
    assert (thinking["exact_match"]["value"], thinking["clipped_ratio"]["value"]) == (0, 1)
    assert thinking["completion_length"]["value"] == 9
    assert "by_mode" not in s.scores([held(question())], s.Findings({"chat": right}))


def test_perplexity_leaves_out_documents_without_weight_and_tells_manifests_apart():
    texts = [
        held({"text": "a"}, {"text": "b"}, format="text", name="x"),
        held({"text": "c"}, format="text", name="y"),
    ]
    found = s.perplexity(
        texts, {"x:test": [Likelihood(-3.0, 3.0), Likelihood(0.0, 0.0)], "y:test": [Likelihood(-8.0, 1.0)]}
    )
    assert found["value"] == pytest.approx(math.exp(11 / 4)) and found["n"] == 2
    assert found["by_manifest"]["x:test"]["value"] == pytest.approx(math.e)


def test_the_sum_prefers_what_is_short_and_the_mean_does_not():
    rows = [held({"prompt": [], "family": "f"}, format="preference")]
    found = s.preference_accuracy(rows, {"set:test": [pair(-4.0, -3.0, (8, 2))]})
    assert found["value"] == 0 and found["length_normalised"]["value"] == 1
    assert found["margin"]["value"] == -1.0


def test_reward_accuracy_compares_with_the_reference_and_a_tie_is_no_success():
    rows = [held(*[{"prompt": [], "family": "f"}] * 3, format="preference")]
    own = s.Findings(pairs={"set:test": [pair(-5, -4), pair(-5, -4), pair(-1, -4)]})
    reference = s.Findings(pairs={"set:test": [pair(-9, -4), pair(-5, -4), pair(-1, -9)]})
    found = s.scores(rows, own, reference=reference)
    assert found["preference_accuracy"]["value"] == 1 / 3
    assert found["reward_accuracy"]["value"] == 1 / 3  # margins 4, 0, -5
    assert found["reward_accuracy"]["margin"]["value"] == pytest.approx(-1 / 3)
    assert s.scores(rows, own)["reward_accuracy"] is None


@pytest.mark.parametrize(
    ("parts", "options", "missing"),
    [
        ([held(question())], {}, {"refusal_rate", "perplexity", "preference_accuracy", "reward_accuracy"}),
        ([held(UNSAFE)], {}, {"over_refusal_rate", "perplexity", "preference_accuracy", "reward_accuracy"}),
        ([held({"text": "x"}, format="text")], {}, set(s.KEYS) - {"perplexity"}),
        (
            [held(UNSAFE, BENIGN)],
            {"samples": 0},
            {"pass_at_k", "perplexity", "preference_accuracy", "reward_accuracy"},
        ),
        (
            [held({"prompt": []}, format="preference")],
            {"reference": False},
            set(s.KEYS) - {"preference_accuracy"},
        ),
    ],
)
def test_what_is_missing_is_null_and_has_a_reason(parts, options, missing):
    options = {"samples": 2, "base": True, "reference": True, **options}
    found = s.Findings()
    for part in parts:
        if part.format == "prompt":
            found.answers = {"chat": [answer("2") for _ in part.rows]}
            found.drawn = (
                [[answer("2")] * options["samples"] for _ in part.rows] if options["samples"] else []
            )
        elif part.format == "preference":
            found.pairs = {part.label: [pair(-1, -2) for _ in part.rows]}
        else:
            found.texts = {part.label: [Likelihood(-1, 1) for _ in part.rows]}
    made = s.scores(parts, found, ks=[1], reference=found if options["reference"] else None)
    assert tuple(made) == s.KEYS
    assert {key for key, measure in made.items() if measure is None} == missing
    assert set(s.notes(parts, **options)) == missing


def test_a_missing_base_is_noted():
    assert "base" in s.notes([held(question())], samples=1, base=False, reference=False)


def test_wins_are_right_answers_to_what_the_other_got_wrong():
    rows = [question(), question(), question(), question(), {"messages": []}]
    ours = [answer(t) for t in ("2", "2", "3", "3", "x")]
    theirs = [answer(t) for t in ("3", "2", "2", "3", "y")]
    verdicts = exact_verdicts(rows, ours, theirs)
    assert verdicts == ["win", "tie", "loss", "tie", None]
    assert exact_verdicts(rows, theirs, ours) == ["loss", "tie", "win", "tie", None]
    found = win_rate(["win", *verdicts], ["b", "a", "a", "a", "b", "b"])
    assert (found["win"], found["tie"], found["loss"], found["n"]) == (2, 2, 1, 5)
    assert found["value"] == 3 / 5 and found["interval"] == statistics.wilson(3, 5)
    assert found["decided"]["value"] == 2 / 3
    assert found["by_family"]["a"] | {"interval": None} == {
        "value": 0.5, "interval": None, "n": 3, "win": 1, "tie": 1, "loss": 1
    }  # fmt: skip
    assert win_rate([None], ["a"]) is None
