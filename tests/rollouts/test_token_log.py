"""The write-ahead log: what was reported is there after any kill, and is never sampled again."""

import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.errors import CheckpointError, DataError, RunError
from lab_utils.rollouts.log import RoundLogs, TokenLog, prompt_hash

EOS, BUDGET = 1, 40


def token_of(key: int, place: int) -> tuple[int, float]:
    """A sampler whose tokens depend on key and place alone."""
    draw = random.Random(f"{key}:{place}")
    return draw.randrange(1, 30), -draw.random()


def test_what_was_appended_is_read_back(tmp_path):
    path = tmp_path / "a.log"
    with TokenLog.open(path) as log:
        log.announce({7: [1, 2], 2**40: [3]})
        log.append([(7, 11, -0.1), (2**40, 12, math.nan)])
        log.append([(7, 13, -1 / 3)])
        log.append([])
        log.complete([(7, True, 0.5)])
    again = TokenLog.open(path)
    assert again.cut == 0
    assert again.replay()[7] == ([11, 13], [-0.1, -1 / 3])
    tokens, logprobs = again.replay()[2**40]
    assert tokens == [12] and math.isnan(logprobs[0])
    known = again.answers[7]
    assert (known.final, known.finished, known.reward, known.prompt) == (True, True, 0.5, prompt_hash([1, 2]))
    again.append([(2**40, 14, -1.0)])
    again.close()
    again.close()
    assert TokenLog.open(path).replay()[2**40][0] == [12, 14]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_torn_tail_is_cut(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "a.log"
    batches = data.draw(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=6))
    sizes, states = [], []
    log = TokenLog.open(path)
    sizes.append(os.path.getsize(path))
    states.append({})
    for batch in batches:
        log.append([(key, 5 + key, -0.5) for key in batch])
        sizes.append(os.path.getsize(path))
        states.append({key: len(tokens) for key, (tokens, _) in log.replay().items()})
    log.close()
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    junk = data.draw(st.binary(max_size=40))
    path.write_bytes(whole[:at] + (junk if at > sizes[0] else b""))
    if whole.startswith(path.read_bytes()) is False and path.read_bytes().startswith(whole):
        return  # junk that happens to go on as a frame would is not a tear
    log = TokenLog.open(path)
    kept = max((i for i, size in enumerate(sizes) if size <= at), default=0)
    assert {key: len(tokens) for key, (tokens, _) in log.replay().items()} == states[kept]
    log.append([(9, 1, 0.0)])
    log.close()
    assert TokenLog.open(path).replay()[9] == ([1], [0.0]), "it goes on behind the cut"


def test_a_flipped_byte_ends_the_log_there(tmp_path):
    path = tmp_path / "a.log"
    with TokenLog.open(path) as log:
        log.append([(1, 4, 0.0)])
        end = path.stat().st_size
        log.append([(1, 5, 0.0)])
    damaged = bytearray(path.read_bytes())
    damaged[end + 12] ^= 1
    path.write_bytes(bytes(damaged))
    log = TokenLog.open(path)
    assert log.replay()[1][0] == [4] and log.cut == len(damaged) - end and path.stat().st_size == end


WRITER = """
    import sys, time
    from lab_utils.rollouts.log import TokenLog
    sys.path.insert(0, {tests!r})
    from test_token_log import BUDGET, EOS, token_of

    log = TokenLog.open(sys.argv[1])
    prompts = {{key: [key, 2] for key in range(5)}}
    log.announce(prompts)
    live = []
    for key in prompts:
        tokens = log.answers[key].tokens
        if len(tokens) < BUDGET and EOS not in tokens:
            live.append(key)
    print("ready", flush=True)
    while live:
        step = [(key, *token_of(key, len(log.answers[key].tokens))) for key in live]
        log.append(step)
        time.sleep(0.01)  # a kill is to meet it at work
        for key, token, logprob in step:
            print(key, len(log.answers[key].tokens) - 1, token, logprob.hex(), flush=True)
        live = [k for k in live if len(log.answers[k].tokens) < BUDGET and log.answers[k].tokens[-1] != EOS]
    log.close()
    print("done", flush=True)
"""


def test_killed_writers_sample_each_token_once(tmp_path):
    """SIGKILL at random moments, until one attempt gets to the end: every reported token is in the log, as reported,
    and none is reported twice."""
    script = tmp_path / "writer.py"
    script.write_text(textwrap.dedent(WRITER.format(tests=os.path.dirname(__file__))))
    path, reported, attempts, draw = tmp_path / "a.log", {}, 0, random.Random(3)
    while attempts < 60:
        attempts += 1
        process = subprocess.Popen(
            [sys.executable, str(script), str(path)], stdout=subprocess.PIPE, text=True
        )
        kill_after, lines = draw.randrange(1, 60), 0
        for line in process.stdout:
            parts = line.split()
            if len(parts) == 4:
                place = int(parts[0]), int(parts[1])
                assert place not in reported, "a token was sampled twice"
                reported[place] = int(parts[2]), float.fromhex(parts[3])
                lines += 1
            if lines >= kill_after and attempts < 5:
                process.send_signal(signal.SIGKILL)
        process.stdout.close()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert attempts > 2
    expected = {}
    for key in range(5):
        for place in range(BUDGET):
            expected[key, place] = token_of(key, place)
            if expected[key, place][0] == EOS:
                break
    found = TokenLog.open(path).replay()
    logged = {(k, i): pair for k, (t, p) in found.items() for i, pair in enumerate(zip(t, p))}
    assert logged == expected
    # A token can be in the log and its report be lost with the process; never the other way round.
    assert reported.items() <= logged.items() and len(reported) > 0.5 * len(logged)


def test_no_open_twice(tmp_path):
    log = TokenLog.open(tmp_path / "a.log")
    with pytest.raises(RunError, match="another process writes this log"):
        TokenLog.open(tmp_path / "a.log")
    log.close()
    TokenLog.open(tmp_path / "a.log").close()


def test_a_log_of_other_data_is_refused(tmp_path):
    with TokenLog.open(tmp_path / "a.log", context="T=1") as log:
        log.announce({3: [1, 2, 3]})
        log.append([(3, 4, 0.0)])
    with pytest.raises(DataError, match="other settings: resume with the recipe"):
        TokenLog.open(tmp_path / "a.log", context="T=2")
    log = TokenLog.open(tmp_path / "a.log", context="T=1")
    log.announce({3: [1, 2, 3], 4: [9]})
    with pytest.raises(DataError, match="answer 3 belong to another prompt"):
        log.announce({3: [1, 2]})
    (tmp_path / "b.log").write_text("something else altogether")
    with pytest.raises(CheckpointError, match="not a log of sampled tokens"):
        TokenLog.open(tmp_path / "b.log")


def test_a_complete_answer_takes_no_more_tokens(tmp_path):
    log = TokenLog.open(tmp_path / "a.log")
    log.append([(1, 4, 0.0)])
    log.complete([(1, False, math.nan)])
    with pytest.raises(RunError, match="answer 1 is complete"):
        log.append([(1, 5, 0.0)])
    with pytest.raises(RunError, match="complete already"):
        log.complete([(1, True, 0.0)])


def test_other_ranks_go_on_where_one_was_killed(tmp_path):
    """The answers of a round are dealt out anew when the number of ranks changes."""
    first = RoundLogs(tmp_path, rank=0).open(4)
    first.announce({0: [1], 1: [2]})
    first.append([(0, 10, -0.1), (1, 20, -0.2)])
    first.close()
    logs = [RoundLogs(tmp_path, rank=r) for r in (0, 1)]
    zero, one = logs[0].open(4), logs[1].open(4)
    assert one.answers[1].tokens == [20]
    with pytest.raises(DataError, match="another prompt"):
        one.announce({1: [3]})
    one.append([(1, 21, -0.3)])
    zero.append([(0, 11, -0.4)])
    zero.close(), one.close()
    alone = logs[0].open(4)
    assert alone.replay() == {0: ([10, 11], [-0.1, -0.4]), 1: ([20, 21], [-0.2, -0.3])}
    alone.append([(1, 22, 0.0)])
    alone.close()


def test_duplicates_and_gaps_raise(tmp_path):
    logs = [RoundLogs(tmp_path, rank=r) for r in (0, 1, 2)]
    a, b = logs[0].open(1), logs[1].open(1)  # both know nothing: a fault of the caller
    a.append([(5, 1, 0.0)])
    b.append([(5, 1, 0.0)])
    a.close(), b.close()
    with pytest.raises(CheckpointError, match="token 0 of answer 5 is there twice"):
        logs[2].open(1)
    c = logs[0].open(2)
    c.append([(6, 1, 0.0)])
    c.close()
    d = logs[1].open(2)
    d.append([(6, 2, 0.0)])
    d.close()
    os.remove(tmp_path / "round-000002.rank-0.log")
    with pytest.raises(CheckpointError, match="token 1 of answer 6 is there, but not all before it"):
        logs[2].open(2)


def test_old_rounds_are_forgotten(tmp_path):
    logs = RoundLogs(tmp_path)
    for round in (0, 1, 2, 10):
        logs.open(round).close()
    (tmp_path / "round-x.log").touch()
    logs.forget_before(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "round-000002.rank-0.log",
        "round-000010.rank-0.log",
        "round-x.log",
    ]


def test_syncs_are_few(tmp_path, monkeypatch):
    calls = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append(d), real(d)))
    log = TokenLog.open(tmp_path / "a.log")
    started = time.monotonic()
    for _ in range(300):
        log.append([(1, 2, 0.0)])
    spent = time.monotonic() - started
    assert len(calls) <= 2 + spent / 0.5
    log.close()
    assert log.path.stat().st_size > 300 * 24
