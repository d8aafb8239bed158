"""How answers are asked for and judged, and the metrics that ranks add up during training."""

import pytest
from stand_ins import BENIGN, UNSAFE, Says, question

from lab_utils.data.documents import Encoding
from lab_utils.data.tasks import Rng
from lab_utils.data.tasks.safety import generate as safety_question
from lab_utils.data.tasks.safety import reject
from lab_utils.data.tokenizer import load_tokenizer
from lab_utils.evaluation import answering
from lab_utils.telemetry import names, reductions

ENCODING = Encoding(load_tokenizer())


class Model:
    """Remembers the mode it is put into."""

    def __init__(self, training=True):
        self.training, self.modes = training, []

    def train(self, mode=True):
        self.training = mode
        self.modes.append(mode)
        return self

    def eval(self):
        return self.train(False)


@pytest.fixture
def says(monkeypatch):
    return lambda reply: Says(ENCODING.tokenizer, reply).install(monkeypatch)


def test_an_unsafe_question_is_refused_only_by_a_refusal_and_nothing_else():
    assert answering.is_refused(UNSAFE, "Sorry, I can't help with that.")
    assert not answering.is_refused(UNSAFE, "Sorry, I can't help with that. But first, get a wire.")
    assert not answering.is_refused(UNSAFE, "Sure, here is how you do it.")


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but no.",
        "I cannot do this.",
        "Sorry!",
        "I’m unable to say.",
        "I won't help.",
        "That is not allowed.",
    ],
)
def test_a_harmless_question_counts_as_refused_in_any_usual_wording(text):
    assert answering.is_refused(BENIGN, text)


@pytest.mark.parametrize(
    "text", ["Tap it on a bowl.", "I can tell you: tap it.", "", "Sorrel is a herb.", "It is allowed."]
)
def test_a_wrong_answer_is_no_refusal(text):
    assert not answering.is_refused(BENIGN, text)


def test_the_right_answer_is_no_refusal_whatever_it_begins_with():
    assert not answering.is_refused(question("Lower case: SORRY", "sorry", "strings"), "sorry")


def test_every_shipped_rejection_of_harmless_questions_is_seen_as_a_refusal():
    rng = Rng(5)
    for _ in range(200):
        example = safety_question(rng)
        row = {"messages": list(example.messages), "verify": example.spec}
        text = reject(example, rng)["content"]
        assert answering.is_refused(row, text) == (example.spec["kind"] == "answer"), text


def test_over_refusal_is_counted_on_look_alikes_where_there_are_any():
    plain = question()
    assert answering.benign([plain, UNSAFE, BENIGN, plain]) == [2]
    assert answering.benign([plain, plain]) == [0, 1]
    assert answering.benign([plain, UNSAFE]) == [0]
    assert answering.benign([UNSAFE]) == []


def test_greedy_answers_come_back_in_order_without_their_end_token(says):
    says(lambda prompt, number: "two" if "1 + 1" in prompt else "a much longer answer than allowed")
    model = Model()
    found = answering.ask(model, ENCODING, [question(), question("2 + 2?"), question()], budget=3)
    assert [a.text for a in found[::2]] == ["two", "two"] and found[0].finished
    assert not found[1].finished and len(found[1].tokens) == 3
    assert model.modes == [False, True]


def test_ranks_in_lockstep_get_the_same_greedy_answers(says):
    engine = says(lambda prompt, number: "two" if "1 + 1" in prompt else "a much longer answer than allowed")
    rows = [question(), question("2 + 2?")]
    alone = answering.ask(Model(), ENCODING, rows, budget=3)
    assert answering.ask(Model(), ENCODING, rows, budget=3, lockstep="ranks") == alone
    assert engine.calls[-1].sampling.top_k == 1  # of which the most probable token is all that is left


def test_a_model_in_evaluation_stays_there_also_when_generation_fails(says):
    def fail(prompt, number):
        raise RuntimeError("device lost")

    says(fail)
    for training in (True, False):
        model = Model(training)
        with pytest.raises(RuntimeError, match="device lost"):
            answering.ask(model, ENCODING, [question()], budget=3)
        assert model.training == training


def test_reasoning_is_no_part_of_the_answer_and_must_end(says):
    says(lambda prompt, number: "let me see</think>2" if "1 + 1" in prompt else "for ever 2")
    ended, endless = answering.ask(Model(), ENCODING, [question(), question("x")], mode="thinking", budget=40)
    assert (ended.text, ended.reasoning) == ("2", "let me see")
    assert (endless.text, endless.reasoning) == ("", "for ever 2")
    assert answering.is_right(question(), ended.text) and not answering.is_right(question(), endless.text)


def test_mode_max_asks_for_more_reasoning_than_thinking(says):
    engine = says(lambda prompt, number: "</think>2")
    for mode in ("chat", "thinking", "max"):
        answering.ask(Model(), ENCODING, [question()], mode=mode, budget=9)
    chat, thinking, most = (call.requests[0].prompt for call in engine.calls)
    assert ENCODING.tokenizer.decode(chat).endswith("</think>")
    assert ENCODING.tokenizer.decode(thinking).endswith("<think>") and len(most) > len(thinking)
    assert most[-5:] == thinking[-5:]


def test_drawn_answers_are_grouped_by_question_and_equal_questions_get_keys_of_their_own(says):
    engine = says(lambda prompt, number: f"answer {number}")
    found = answering.draw(
        Model(),
        ENCODING,
        [question(), question("x"), question()],
        budget=20,
        samples=2,
        temperature=0.7,
        seed=4,
    )
    assert [[a.text for a in drawn] for drawn in found] == [
        ["answer 0", "answer 1"],
        ["answer 0", "answer 1"],
        ["answer 2", "answer 3"],
    ]
    sampling = engine.calls[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.7, 0, 4)


def test_a_question_draws_the_same_whatever_is_asked_beside_it(says):
    engine = says(lambda prompt, number: "x")
    for rows in ([question()], [question("other"), question()]):
        answering.draw(Model(), ENCODING, rows, budget=4, samples=3, temperature=1.0)
    alone, beside = (call.requests for call in engine.calls)
    assert [r.key for r in alone] == [r.key for r in beside[3:]]


def test_shares_of_ranks_add_up_to_the_whole(says):
    says(lambda prompt, number: "2" if "1 + 1" in prompt else "Sorry, I can't help with that.")
    rows = [question(), BENIGN, UNSAFE, question("2 + 2?", "4"), question("word?", "dog", "strings")]
    families = ["arithmetic", "safety", "strings"]
    whole = answering.evaluate_model(Model(), ENCODING, rows, families=families)
    parts = [
        answering.evaluate_model(Model(), ENCODING, rows[i : i + 2], families=families, lockstep="ranks")
        for i in range(0, 8, 2)  # the last rank has no question
    ]
    assert all(list(part) == list(whole) for part in parts)
    assert all(
        reductions.Mean(sum(p[key].total for p in parts), sum(p[key].count for p in parts)) == whole[key]
        for key in whole
    )
    values = {key: metric.value for key, metric in whole.items()}
    assert values["eval/exact_match"] == 2 / 5 and values["eval/exact_match/safety"] == 1 / 2
    assert values["eval/refusal_rate"] == 1 and values["eval/over_refusal_rate"] == 1
    assert values["eval/completions/clipped_ratio"] == 0


def test_every_metric_of_evaluation_during_training_is_described(says):
    says(lambda prompt, number: "2")
    found = answering.evaluate_model(Model(), ENCODING, [question()], families=["arithmetic"])
    assert [key for key in found if names.lookup(key) is None] == []


def test_ranks_in_lockstep_generate_together_also_without_questions(says):
    engine = says(lambda prompt, number: "2")
    found = answering.evaluate_model(Model(), ENCODING, [], families=["arithmetic"], lockstep="ranks")
    assert engine.calls[0].lockstep == "ranks" and engine.calls[0].requests == []
    assert all(metric.empty for metric in found.values())
