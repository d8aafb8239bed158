"""Sampling with the model itself, through the log: a kill in the middle costs no token, and none is sampled twice."""

import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lab_utils.data.documents import Encoding
from lab_utils.data.tokenizer import load_tokenizer
from lab_utils.errors import DataError, RunError
from lab_utils.models.generate import Request, Sample, Sampling
from lab_utils.rollouts.in_process import InProcess

ENCODING = Encoding(load_tokenizer())
EOS = ENCODING.tokenizer.eos_id
SAMPLING = Sampling(1.0, 1.0, 0, 3)


def deterministic(sampled):
    """A generate whose tokens depend on key and place; ``sampled(key, place)`` is called for each that it draws."""

    def generate(model, requests, *, sampling, eos_id, slots, want_routing, on_tokens, lockstep):
        tokens = {r.key: list(r.done) for r in requests}
        logprobs = {r.key: list(r.done_logprobs) for r in requests}
        budget = {r.key: r.max_new_tokens for r in requests}
        over = lambda key: tokens[key][-1:] == [eos_id] or len(tokens[key]) >= budget[key]  # noqa: E731
        while live := [key for key in tokens if not over(key)]:
            step = []
            for key in live[:slots]:
                draw = random.Random(f"{sampling.seed}:{key}:{len(tokens[key])}")
                sampled(key, len(tokens[key]))
                token = eos_id if draw.random() < 0.05 else draw.randrange(20, 60)
                step.append((key, token, -draw.random()))
            for key, token, logprob in step:
                tokens[key].append(token)
                logprobs[key].append(logprob)
            if on_tokens is not None:
                on_tokens(step)
        return [Sample(tokens[r.key], logprobs[r.key], tokens[r.key][-1:] == [eos_id]) for r in requests]

    return generate


def requests(count=6, budget=30):
    return [Request([5, 6, key], key, budget) for key in range(count)]


def make(folder, sampled, rank=0):
    return InProcess(None, ENCODING, folder, rank=rank, slots=4, generate=deterministic(sampled))


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 5, 23, 70])
def test_an_interrupted_round_goes_on(tmp_path, after):
    calls = []
    reference = make(tmp_path / "whole", lambda *place: calls.append(place))
    reference.begin(0)
    whole = reference.sample(requests(), SAMPLING)
    drawn, limit = [], [after]

    def sampled(key, place):
        if limit[0] is not None and len(drawn) >= limit[0]:
            raise Killed
        drawn.append((key, place))

    first = make(tmp_path / "torn", sampled)
    first.begin(0)
    with pytest.raises(Killed):
        first.sample(requests(), SAMPLING)
    first.end()
    limit[0] = None
    before, again = list(drawn), make(tmp_path / "torn", sampled)
    drawn.clear()
    again.begin(0)
    assert again.sample(requests(), SAMPLING) == whole
    # Tokens of a step that was never reported are drawn again, by the same noise; reported ones are not.
    assert len(set(before) & set(drawn)) < 4 and set(before) | set(drawn) == set(calls)
    again.end()
    drawn.clear()
    third = make(tmp_path / "torn", sampled)
    third.begin(0)
    assert third.sample(requests(), SAMPLING) == whole and drawn == [], "a finished round is only read"


CHILD = """
    import sys
    import time
    sys.path.insert(0, {tests!r})
    from test_in_process import SAMPLING, make, requests

    def sampled(key, place):
        print(key, place, flush=True)
        time.sleep(0.005)  # slow enough to be killed at some place

    sampler = make(sys.argv[1], sampled, rank=int(sys.argv[2]))
    sampler.begin(2)
    sampler.sample(requests(8, 60), SAMPLING)
    sampler.end()
"""


def test_killed_processes_sample_every_logged_token_once(tmp_path):
    """SIGKILL in the middle of a real process, under one rank, then another, then one again."""
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD.format(tests=str(Path(__file__).parent))))
    folder, logged_before = tmp_path / "logs", {}
    for rank, kill_after in ((0, 40), (1, 60), (0, None)):
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank)], stdout=subprocess.PIPE, text=True
        )
        places = []
        for line in process.stdout:
            places.append(tuple(map(int, line.split())))
            if len(places) == kill_after:
                process.send_signal(signal.SIGKILL)
        process.stdout.close()
        assert process.wait() == (0 if kill_after is None else -signal.SIGKILL)
        assert all(place >= logged_before.get(key, 0) for key, place in places), (
            "a logged token was sampled again"
        )
        probe = make(folder, lambda *_: None, rank=9)
        probe.begin(2)
        probe.resumed([], SAMPLING)
        logged_before = {key: len(a.tokens) for key, a in probe.log.answers.items()}
        probe.end()
        (folder / "round-000002.rank-9.log").unlink()
    reference = make(tmp_path / "whole", lambda *_: None)
    reference.begin(2)
    whole = reference.sample(requests(8, 60), SAMPLING)
    last = make(folder, lambda *place: pytest.fail(f"{place} was sampled again"))
    last.begin(2)
    assert last.sample(requests(8, 60), SAMPLING) == whole


def test_other_prompts_or_settings_are_refused(tmp_path):
    sampler = make(tmp_path, lambda *_: None)
    with pytest.raises(RunError, match="call begin"):
        sampler.sample(requests(), SAMPLING)
    sampler.begin(0)
    sampler.sample(requests(2), SAMPLING)
    with pytest.raises(DataError, match="another prompt"):
        sampler.sample([Request([1], 0, 5)], SAMPLING)
    with pytest.raises(RunError, match="one key"):
        sampler.sample([Request([1], 7, 5), Request([2], 7, 5)], SAMPLING)
    sampler.begin(0)
    with pytest.raises(DataError, match="other settings"):
        sampler.sample(requests(2), Sampling(0.5, 1.0, 0, 3))


def test_later_prompts_of_a_round_and_ranks_without_any(tmp_path):
    sampler = make(tmp_path, lambda *_: None)
    sampler.begin(0)
    assert sampler.sample([], SAMPLING) == []
    first = sampler.sample(requests(2), SAMPLING)
    more = sampler.sample([Request([8], 50, 4)], SAMPLING)
    assert len(first) == 2 and len(more[0].tokens) <= 4
    sampler.begin(1)
    sampler.sample(requests(1), SAMPLING)
    sampler.end()
    sampler.forget_before(1)
    assert [p.name for p in tmp_path.glob("*.log")] == ["round-000001.rank-0.log"]


def test_ask_gives_texts_and_leaves_no_log(tmp_path):
    seen = []

    def generate(model, asked, *, sampling, eos_id, on_tokens, **_):
        seen.extend(asked)
        assert on_tokens is None and sampling.temperature == 1.0
        said = [ENCODING.tokenizer.encode(f"reply {i}") for i in range(len(asked))]
        return [Sample([*ids, eos_id], [0.0] * (len(ids) + 1), True) for ids in said]

    sampler = InProcess(None, ENCODING, tmp_path, generate=generate, ask_tokens=17)
    prompts = [[{"role": "user", "content": text}] for text in ("one", "two", "one")]
    assert sampler.ask(prompts) == ["reply 0", "reply 1", "reply 2"]
    assert len({r.key for r in seen}) == 3 and all(r.max_new_tokens == 17 for r in seen)
    assert sampler.ask([]) == [] and not list(tmp_path.glob("*.log"))
