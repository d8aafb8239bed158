"""`lab ascend check`: its rows, what they say of a fault put into an operator, and how a child's end is told."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lab_utils.ascend import check
from lab_utils.ascend.checks import training_step
from lab_utils.ascend.commands import app
from lab_utils.errors import RecipeError
from lab_utils.registry import load, members

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def module(name: str, *parts: str, stand_in: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        __name__=f"x.{name}", PROVES={p: f"{p} works" for p in parts}, STAND_IN=stand_in, ORDER=1
    )


@pytest.fixture
def speaking(monkeypatch, tmp_path):
    """A child that prints what it is told to, in place of a check's; returns the rows of two parts."""

    def rows(code: str) -> list[check.Row]:
        real = check.subprocess.run
        monkeypatch.setattr(
            check.subprocess, "run", lambda words, **options: real([words[0], "-c", code], **options)
        )
        return check._child(module("two", "first", "second", stand_in=False), tmp_path)

    return rows


def test_a_child_answers_part_by_part_among_whatever_else_is_printed(speaking):
    first, second = speaking(
        "print('torch says hello')\n"
        'print(\'ascend-check ["first", true, "all of it"]\')\n'
        'print(\'ascend-check ["second", false, "two are wrong"]\')'
    )
    assert (first.check, first.ok, first.found) == ("two.first", True, "all of it")
    assert (second.ok, second.found, second.proves) == (False, "two are wrong", "second works")
    assert set(first.as_dict()) >= {"check", "ok", "proves"}


def test_a_child_that_dies_fails_what_it_had_not_answered(speaking):
    first, second = speaking(
        "print('ascend-check [\"first\", true, \"\"]', flush=True); raise ValueError('broken')"
    )
    assert first.ok and not second.ok and "code 1: ValueError: broken" in second.found


def test_a_child_that_hangs_is_ended(speaking, monkeypatch):
    monkeypatch.setattr(check, "SECONDS", 2.0)
    first, _ = speaking("import time; time.sleep(60)")
    assert not first.ok and "no answer in 2 s" in first.found


def test_every_check_says_what_it_proves():
    orders = set()
    for name in members(check.CHECKS):
        found = load(check.CHECKS, name)
        orders.add(found.ORDER)
        assert found.PROVES and all(len(text) > 20 for text in found.PROVES.values())
    assert len(orders) == len(members(check.CHECKS))


def test_the_verb_fails_when_a_row_does_and_says_what_no_row_can_prove(monkeypatch):
    def examine(names, say):
        return [check.Row("one", ok, "that it works", "it does", 1.0)]

    monkeypatch.setattr(check, "examine", examine)
    for ok in (True, False):
        done = CliRunner().invoke(app, ["check"])
        assert done.exit_code == (0 if ok else 1)
        assert "proves no number" in " ".join(done.output.split()) and "no speed" in done.output
    with pytest.raises(RecipeError, match="did you mean 'operators'"):
        CliRunner().invoke(app, ["check", "--only", "operatrs"], catch_exceptions=False)


def test_an_operator_without_a_kernel_or_reason_fails_the_audit(monkeypatch):
    kinds = {
        "aten::a": "npu",
        "aten::b": "view",
        "aten::c": "composite",
        "aten::d": "none",
        "aten::_grouped_mm": "npu",
    }
    monkeypatch.setattr(training_step, "kernel", kinds.get)
    bad, _ = training_step.audit({"aten::a": 1, "aten::b": 2})
    assert bad == []
    bad, _ = training_step.audit({"aten::c": 3, "aten::d": 1})
    assert len(bad) == 2 and "aten::c (3 times) has no NPU kernel" in bad[0]
    bad, _ = training_step.audit({"aten::_grouped_mm": 1})
    assert "npu_grouped_matmul takes its place" in bad[0]
    monkeypatch.setitem(training_step.ALLOWED, "aten::c", ("by another", ("aten::a",)))
    assert training_step.audit({"aten::c": 3})[0] == []
    monkeypatch.setitem(training_step.ALLOWED, "aten::c", ("by another", ("aten::d",)))
    assert training_step.audit({"aten::c": 3})[0] == ["aten::c runs as aten::d, which has no NPU kernel"]


# operator -> (what stands in its npu.py, the fault in its place, what the check must say)
FAULTS = {
    "rms_norm": ("rows, weight, eps)", "rows, weight, eps, axis=-1)", "expected at most 3 argument"),
    "expert_dispatch": ("places(order_M, k))[0]", "places(order_M, k))[0].double()", "float64"),
    "grouped_swiglu": (
        "d_weights, d_gate_up, d_down",
        "d_weights, None, d_down",
        "gate_up_EGD has no gradient",
    ),
}


@pytest.mark.slow
def test_a_wrong_argument_a_wrong_dtype_and_a_missing_gradient_each_fail_the_check(
    cann, tmp_path, monkeypatch
):
    """The check runs on a copy of the operators with the faults in it, which comes first on the children's path."""
    shutil.copytree(KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for operator, (right, wrong, _) in FAULTS.items():
        file = tmp_path / "kernels" / operator / "npu.py"
        text = file.read_text()
        assert right in text
        file.write_text(text.replace(right, wrong))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = {row.check: row for row in check.examine(["operators"], place=cann)}
    calls = rows["operators.calls"]
    assert rows["operators.exist"].ok and not calls.ok
    for operator, (_, _, said) in FAULTS.items():
        assert said in next(text for text in calls.found.split("; ") if text.startswith(f"{operator}/npu"))
