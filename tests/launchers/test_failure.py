"""Why a job failed is said in one sentence, about the rank that failed first."""

import json
import signal
import time

import pytest

from lab_utils.errors import DataError
from lab_utils.launchers._failure import Exit, diagnose, last_words, parse_torchrun
from lab_utils.launchers._rank import sentence

TABLE = """
E1124 00:01:07 failed (exitcode: -9) local_rank: 1 (pid: 9324) of binary: python
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
=====================================================
lab_utils.launchers._rank FAILED
-----------------------------------------------------
Failures:
{others}
-----------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_00:01:07
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 9324)  ({name})
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
=====================================================
"""
OTHER = """[1]:
  time      : 2026-11-24_00:01:08
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 9325)
  error_file: <N/A>
"""


def table(rank: int, code: int, *others: tuple[int, int]) -> str:
    listed = "".join(OTHER.format(rank=r, code=c) for r, c in others) or "  <NO_OTHER_FAILURES>"
    return TABLE.format(rank=rank, code=code, name="", others=listed)


def ask(run_dir, text: str, since: float = 0.0, code: int = 1) -> tuple[str, int | None]:
    found, rank = diagnose(run_dir, since=since, launcher_text=text, code=code)
    assert "\n" not in found and found.endswith((".", ")"))
    return found, rank


def report(run_dir, rank: int, error: str, at: float) -> None:
    text = json.dumps({"rank": rank, "time": at, "error": error})
    (run_dir.logs / f"rank-{rank}.error.json").write_text(text)


def test_the_table_of_torchrun_is_read_root_cause_first():
    assert parse_torchrun(table(3, 1, (0, -15), (2, -6))) == [
        Exit(3, 1, True),
        Exit(0, -15, False),
        Exit(2, -6, False),
    ]
    assert parse_torchrun("nothing of the kind") == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT])
def test_a_rank_killed_by_a_signal_is_named_with_it(run_dir, number):
    text, rank = ask(run_dir, table(1, -number))
    assert (
        rank == 1
        and f"Rank 1 was killed by {number.name}" in text
        and f"lab runs resume {run_dir.name}" in text
    )


def test_a_killed_rank_explains_the_lost_connection_of_another(run_dir):
    report(run_dir, 0, "Rank 0: RuntimeError: [gloo] Connection closed by peer.", time.time())
    assert ask(run_dir, table(0, 1, (1, -9)))[1] == 1
    run_dir.write_status(state="failed", error="Rank 0 lost its connection to another rank, which died.")
    assert ask(run_dir, table(0, 1, (1, -9)))[1] == 1


def test_a_real_error_is_not_hidden_by_the_death_of_the_others(run_dir):
    report(run_dir, 0, "train.jsonl, line 7: no messages.", time.time())
    assert ask(run_dir, table(0, 3, (1, -6))) == ("train.jsonl, line 7: no messages.", 0)


def test_the_workers_own_sentence_stands(run_dir):
    run_dir.write_status(state="failed", error="Loss was not finite in 5 steps in a row.")
    assert ask(run_dir, table(0, 5))[0] == "Loss was not finite in 5 steps in a row."


def test_the_earliest_report_of_this_attempt_counts(run_dir):
    report(run_dir, 0, "An old story.", 50.0)
    report(run_dir, 1, "Second.", 120.0)
    report(run_dir, 2, "First.", 110.0)
    assert ask(run_dir, table(1, 1), since=100.0) == ("First.", 2)


def test_without_a_report_the_last_error_line_of_the_first_failing_rank_counts(run_dir):
    (run_dir.logs / "rank-1.log").write_text(
        "start\nTraceback (most recent call last):\nValueError: odd shape\nbye\n"
    )
    assert ask(run_dir, table(1, 9)) == ("Rank 1 ended with exit code 9: odd shape.", 1)


def test_a_launcher_that_never_came_to_start_ranks_is_quoted(run_dir):
    (run_dir.logs / "launcher.log").write_text("bash: line 3: /no/python: No such file or directory\n")
    text, rank = ask(run_dir, "", code=127)
    assert "exit code 127" in text and "No such file" in text and rank is None


def test_a_rank_that_said_nothing_is_still_a_sentence(run_dir):
    assert "left no message" in ask(run_dir, table(0, 2))[0]
    assert last_words(run_dir.logs / "none.log") is None


def test_exceptions_become_sentences_and_errors_for_the_user_stay_as_they_are():
    assert sentence(DataError("Row 7 is bad; mend it."), "1") == "Row 7 is bad; mend it."
    try:
        raise ValueError("odd shape.\nsecond line")
    except ValueError as error:
        text = sentence(error, "3")
    assert text.startswith("Rank 3: ValueError at test_failure.py:") and "odd shape (logs/rank-3.log" in text
    assert "second line" not in text
