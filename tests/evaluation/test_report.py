"""Answers before and after: which questions are asked, how they are judged, and what the report holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lab_utils.errors import DataError, RunError
from lab_utils.evaluation.report import evaluate, read_report
from lab_utils.evaluation.worker import compare, load_questions
from lab_utils.models.load import SHIPPED
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import create


def test_a_limit_spreads_the_questions_evenly_over_the_families():
    everything = load_questions("ascent-tasks-prompts", "test", None)
    families = {q["verify"]["family"] for q in everything}
    some = load_questions("ascent-tasks-prompts", "test", 3 * len(families))
    counts = [sum(q["verify"]["family"] == f for q in some) for f in families]
    assert counts == [3] * len(families) and len(everything) > len(some)


def test_questions_need_a_prompt_set():
    with pytest.raises(DataError, match="questions need format prompt"):
        load_questions("ascent-tasks-sft", "test", None)


def test_the_shares_are_those_of_the_verifiers():
    questions = load_questions("ascent-tasks-prompts", "test", 16)
    arithmetic = [q for q in questions if q["verify"]["family"] == "arithmetic"]
    right = [q["verify"]["expected"] if q in arithmetic else "no idea" for q in questions]
    wrong = ["" for _ in questions]
    found = compare(questions, {"before": wrong, "after": right})
    assert found["exact_match"] == {"before": 0.0, "after": len(arithmetic) / 16}
    assert found["by_family"]["arithmetic"] == {"n": len(arithmetic), "before": 0.0, "after": 1.0}
    assert sum(s["after_ok"] for s in found["samples"]) == len(arithmetic)


@pytest.fixture
def run(tmp_path: Path):
    """A run whose only checkpoint holds the weights it began with."""
    made = create(Recipe.load("sft_tiny"), tmp_path)
    folder = made.path / "checkpoints" / "step-00000001"
    shutil.copytree(SHIPPED / "tiny", folder / "model")
    (folder / "COMPLETE").touch()
    return made


@pytest.mark.slow
def test_the_report_of_unchanged_weights_has_the_same_answers_twice(run):
    evaluate(run, limit=8)
    report = json.loads((run.path / "report.json").read_text())
    assert report == read_report(run.path)
    assert report["n"] == 8 and report["exact_match"]["before"] == report["exact_match"]["after"]
    assert set(report["by_family"]) == {s["family"] for s in report["samples"]}
    assert all(s["before"] == s["after"] for s in report["samples"])


def test_a_run_without_a_checkpoint_gets_one_sentence(tmp_path):
    made = create(Recipe.load("sft_tiny"), tmp_path)
    with pytest.raises(RunError, match="no complete checkpoint to evaluate"):
        evaluate(made, limit=1)
    assert not (made.path / "report.json").exists()
