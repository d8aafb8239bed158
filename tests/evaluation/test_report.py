"""The report from its making to its showing: numbers, tables, figure, page, files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from stand_ins import answer, gold, run_with_checkpoints

from lab_utils.errors import RunError
from lab_utils.evaluation import page, report, tables, worker
from lab_utils.evaluation.held_out import load_questions
from lab_utils.evaluation.likelihood import Likelihood, PairLikelihood
from lab_utils.evaluation.plan import make_plan
from lab_utils.evaluation.scores import KEYS, Findings, Questions

EVERYTHING = "ascent-tasks-prompts,ascent-tasks-sft,ascent-tasks-text,ascent-tasks-preference"


def made_up(target, plan, held, role):
    """The target answers arithmetic and refuses everything of safety; others answer nothing."""
    rows = Questions.of(held).rows
    good = role == "target"

    def says(row):
        if row["verify"]["family"] == "safety":
            return "Sorry, I can't help with that." if good else "Sure! <script>alert(1)</script>"
        return gold(row) if good and row["verify"]["family"] == "arithmetic" else "no idea & <b>nothing</b>"

    return Findings(
        answers={mode: [answer(says(row)) for row in rows] for mode in plan.modes},
        drawn=[[answer(says(row)), answer("")] for row in rows] if plan.samples else [],
        texts={
            h.label: [Likelihood(-1.0 - i - good, 4.0) for i in range(len(h.rows))]
            for h in held
            if h.format in ("messages", "text")
        },
        pairs={
            h.label: [PairLikelihood(Likelihood(-2.0 + good, 2.0), Likelihood(-1.5, 1.0))] * len(h.rows)
            for h in held
            if h.format == "preference"
        },
    )


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(worker, "study", made_up)

    def made(**options):
        options = {"on": EVERYTHING, "limit": 48, "base": "preset:tiny", "samples": 2, **options}
        return json.loads(json.dumps(worker.evaluate_plan(make_plan("base:tiny", **options))))

    return made


def test_every_measure_has_the_same_shape_for_target_and_base(make):
    found = make()
    for side in (found, found["base"]):
        for key in KEYS:
            if side is found["base"] and key == "reward_accuracy":
                assert side[key] is None  # a reference is no better than itself
                continue
            measure = side[key]
            low, high = measure["interval"]
            assert low <= measure["value"] <= high, key
            assert measure["n"] == sum(part["n"] for part in measure["by_family"].values())
            assert all(set(part) >= {"value", "interval", "n"} for part in measure["by_family"].values())
    assert found["exact_match"]["by_family"]["arithmetic"]["value"] == 1
    assert found["base"]["exact_match"]["value"] == 0
    assert found["refusal_rate"]["value"] == 1 and found["over_refusal_rate"]["value"] == 1
    assert found["pass_at_k"]["by_k"]["1"]["by_family"]["arithmetic"]["value"] == 0.5
    assert set(found["perplexity"]["by_manifest"]) == {
        "ascent-tasks-sft:test",
        "ascent-tasks-text:validation",
    }
    assert found["preference_accuracy"]["value"] == 1 and found["base"]["preference_accuracy"]["value"] == 0
    assert found["reward_accuracy"]["value"] == 1
    assert found["notes"] == {}


def test_without_a_base_there_is_null_and_a_reason(make):
    found = make(base=False, on="ascent-tasks-prompts", samples=0)
    assert (
        found["base"] is None
        and "base" in found["notes"]
        and "No answers were sampled" in found["notes"]["pass_at_k"]
    )
    assert found["perplexity"] is None and found["samples"][0].get("base") is None


def test_the_win_rate_compares_answers_to_the_same_questions(make):
    found = make(on="ascent-tasks-prompts", against="preset:tiny", base=False)["win_rate"]
    assert (found["against"], found["judge"], found["loss"]) == ("preset:tiny", "exact", 0)
    assert found["by_family"]["arithmetic"]["win"] == found["by_family"]["arithmetic"]["n"] == 6
    assert found["win"] + found["tie"] == found["n"] == 48


def test_a_judge_reads_both_orders_and_a_disagreement_is_a_tie(make, monkeypatch):
    """A judge that takes the longer answer, and one that always takes the first."""
    from contextlib import nullcontext

    from lab_utils.evaluation import answering

    monkeypatch.setattr(worker, "loaded", lambda target, plan: nullcontext(None))

    def replies(choose):
        def ask(model, encoding, questions, *, budget, **_):
            texts = [q["messages"][0]["content"] for q in questions]
            return [SimpleNamespace(text=f"Because.\nVerdict: {choose(text)}") for text in texts]

        return ask

    def longer(text):
        a, b = (re.search(rf"<<<ANSWER {name} \w+\n(.*?)\n\w+ ANSWER", text, re.S)[1] for name in "AB")
        return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"

    for choose, decided in ((longer, True), (lambda text: "A", False)):
        monkeypatch.setattr(answering, "ask", replies(choose))
        found = make(on="ascent-tasks-prompts", against="preset:tiny", judge="base:tiny", base=False)[
            "win_rate"
        ]
        assert found["judge"] == "base:tiny"
        assert (found["tie"] < found["n"]) is decided
        assert found["without_verdict"] == 0
    assert found["value"] == 0.5 and found["decided"] is None
    monkeypatch.setattr(answering, "ask", replies(lambda text: "A" if "pound" in text else "who knows"))
    found = make(on="ascent-tasks-prompts", against="preset:tiny", judge="base:tiny", base=False)["win_rate"]
    assert found["tie"] == found["n"] and found["without_verdict"] > 0.8


def test_an_old_report_asks_for_a_new_one(tmp_path):
    with pytest.raises(RunError, match=r"has no report\.json yet: make one with lab eval"):
        report.read_report(tmp_path)
    (tmp_path / report.REPORT).write_text('{"exact_match": {"before": 0.0, "after": 1.0}, "by_family": {}}')
    with pytest.raises(RunError, match=r"another version .*run lab eval .* again"):
        report.read_report(tmp_path)


# -- tables and figure ---------------------------------------------------------------------------------------


def test_the_summary_has_a_row_a_family_and_one_of_all(make):
    frame = tables.summary(make())
    assert list(frame.columns) == ["n", "before %", "before 95%", "after %", "after 95%"]
    assert frame.index[-1] == "all" and frame.loc["all", "n"] == 48
    assert (
        frame.loc["arithmetic", "after %"] == 100.0 and frame.loc["arithmetic", "before 95%"] == "[0.0, 39.0]"
    )
    alone = tables.summary(make(base=False), "perplexity")
    assert list(alone.columns) == ["n", "value", "value 95%"]


def test_a_measure_that_is_not_there_says_why(make):
    with pytest.raises(RunError, match=r"no perplexity: No manifest of format messages or text"):
        tables.summary(make(on="ascent-tasks-prompts"), "perplexity")


def test_the_table_of_measures_names_k_and_the_manifests_of_perplexity(make):
    frame = tables.measures(make())
    assert "pass@2" in frame.index and "perplexity, ascent-tasks-sft:test" in frame.index
    assert (
        frame.loc["exact match", "after"] == "14.6 %" and frame.loc["reward margin positive", "before"] == "–"
    )


def test_answers_are_marked_and_limited_by_family(make):
    frame = tables.answers(make(modes="chat,thinking"), per_family=2)
    assert list(frame.columns) == ["question", "expected", "before", "after"]
    assert len(frame) == 16 and frame.loc["arithmetic", "after"].str.startswith("✓").all()
    assert "answer" in tables.answers(make(base=False)).columns


def test_the_figure_has_a_bar_and_an_interval_for_every_family_and_side(make):
    sheet = tables.figure(make())
    ax = sheet.axes[0]
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels[:2] == ["all  (n=48)", "arithmetic  (n=6)"] and len(labels) == 9
    assert sum(len(bars) for bars in ax.containers) == 18
    whiskers = [line for line in ax.lines if len(line.get_xdata()) == 2]
    assert len(whiskers) == 18
    # Each interval lies across the end of its own bar.
    bars = {round(b.get_y() + b.get_height() / 2, 3): b.get_width() for c in ax.containers for b in c}
    for line in whiskers:
        low, high = line.get_xdata()
        assert low - 1e-9 <= bars[round(line.get_ydata()[0], 3)] <= high + 1e-9
    assert "0.0 % → 14.6 %" in ax.get_title(loc="left")
    alone = tables.figure(make(base=False), "completion_length").axes[0]
    assert sum(len(bars) for bars in alone.containers) == 9 and alone.get_legend() is None


# -- page ----------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    VOID = {"meta", "input", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_everything_itself_and_no_answer_becomes_markup(make):
    text = page.samples_page(make())
    tags = Tags(text)
    assert tags.open == []
    assert [
        attrs for tag, attrs in tags.seen if "src" in attrs or attrs.get("href", "#").startswith("#") is False
    ] == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert sum(tag == "script" for tag, _ in tags.seen) == 1 and not any(
        tag == "b" and a for tag, a in tags.seen
    )
    assert "Sure! &lt;script&gt;" in text


def test_a_card_can_be_found_by_family_outcome_mode_and_verdict(make):
    found = make(on="ascent-tasks-prompts", modes="chat,thinking", against="preset:tiny")
    tags = Tags(page.samples_page(found))
    cards = [attrs for tag, attrs in tags.seen if tag == "article"]
    assert len(cards) == 96 == len(found["samples"])
    assert {card["data-outcome"] for card in cards} == {"gained", "wrong"}
    assert {card["data-mode"] for card in cards} == {"chat", "thinking"}
    assert sum(card["data-verdict"] == "win" for card in cards) == found["win_rate"]["win"]
    selects = [attrs["name"] for tag, attrs in tags.seen if tag == "select"]
    assert selects == ["family", "outcome", "mode", "verdict"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (False, True, "gained"), (True, False, "lost"), (True, True, "right"), (False, False, "wrong"),
        (None, None, "unchecked"), ("no base", True, "right"), ("no base", False, "wrong"),
    ],
)  # fmt: skip
def test_outcomes(before, after, expected):
    sample = {"target": {"ok": after}} | ({} if before == "no base" else {"base": {"ok": before}})
    assert page.outcome(sample) == expected


def test_a_report_of_too_many_answers_says_how_many_it_left_out(make, monkeypatch):
    monkeypatch.setattr(worker, "SHOWN", 16)
    found = make(on="ascent-tasks-prompts")
    assert len(found["samples"]) == 16 and found["samples_left_out"] == 32
    assert len({sample["family"] for sample in found["samples"]}) == 8
    assert "32 more are not shown" in page.samples_page(found)


# -- the whole way -------------------------------------------------------------------------------------------


def test_a_run_without_a_checkpoint_gets_one_sentence(tmp_path):
    made = run_with_checkpoints(tmp_path)
    with pytest.raises(RunError, match="no complete checkpoint to evaluate"):
        report.evaluate(made, limit=1)
    assert not (made.path / report.REPORT).exists()


def test_a_failed_evaluation_is_one_sentence_of_its_own_kind_and_keeps_its_log(tmp_path):
    from lab_utils.errors import CheckpointError

    made = run_with_checkpoints(tmp_path, 1)
    (made.path / "checkpoints" / "step-000001" / "model" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"Evaluating .* failed: .*model\.safetensors.*evaluation\.log"):
        report.evaluate(made, on="ascent-tasks-text", limit=1, base=False)
    assert "model.safetensors" in (made.path / "logs" / "evaluation.log").read_text()
    assert not (made.path / report.REPORT).exists()


@pytest.mark.slow
def test_the_report_of_unchanged_weights_has_the_same_answers_twice(tmp_path):
    made = run_with_checkpoints(tmp_path, 1)
    found = report.evaluate(made, on=EVERYTHING, limit=8, samples=2, budget=24)
    assert found.pop("folder") == str(made.path) and found == report.read_report(made.path)
    assert (made.path / report.PAGE).stat().st_size > 10_000
    for key in set(KEYS) - {"reward_accuracy"}:
        assert found[key] == found["base"][key], key
    assert found["exact_match"]["n"] == 8 and found["perplexity"]["n"] == 16
    assert found["reward_accuracy"]["margin"]["value"] == 0
    assert all(s["base"] == s["target"] for s in found["samples"])
    families = {q["verify"]["family"] for q in load_questions("ascent-tasks-prompts", limit=8)}
    assert set(found["exact_match"]["by_family"]) == families


@pytest.mark.slow
def test_weights_of_no_run_leave_files_only_where_they_are_asked_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = report.evaluate("base:tiny", on="ascent-tasks-text", limit=4)
    assert found["folder"] is None and list(tmp_path.iterdir()) == []
    again = report.evaluate("base:tiny", on="ascent-tasks-text", limit=4, out=tmp_path / "kept")
    assert again["perplexity"] == found["perplexity"] and found["perplexity"]["value"] < 10
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["evaluation.log", "report.json"]
