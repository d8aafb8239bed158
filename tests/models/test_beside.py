"""The shared expert's work beside the dispatch, on a stand-in for a device with streams: what waits for what."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from lab_utils.models.deepseek_v4 import expert_parallel
from lab_utils.models.deepseek_v4.expert_parallel import Beside


class StandInStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class StandInTensor:
    device = torch.device("meta")

    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_stream(self, stream):
        self.log.append(f"{self.name} is kept for {stream.name}")


def test_the_streams_wait_for_each_other_and_keep_memory(monkeypatch):
    log = []
    main, side = StandInStream("main", log), StandInStream("side", log)

    @contextmanager
    def stream(chosen):
        log.append(f"on {chosen.name}")
        yield
        log.append("back")

    module = SimpleNamespace(Stream=lambda device: side, current_stream=lambda: main, stream=stream)
    monkeypatch.setattr(torch, "meta", module, raising=False)
    monkeypatch.setattr(expert_parallel, "_streams", {})
    beside = Beside(torch.device("meta"), wanted=True)
    x, y = StandInTensor("x", log), StandInTensor("y", log)
    assert beside.run(lambda given: log.append("work") or y, x) is y
    log.append("dispatch")
    assert beside.wait(y) is y
    assert log == [
        "side waits for main",
        "on side",
        "work",
        "back",
        "x is kept for side",
        "dispatch",
        "main waits for side",
        "y is kept for main",
    ]


def test_a_cpu_has_one_queue():
    beside = Beside(torch.device("cpu"), wanted=True)
    x = torch.ones(3)
    assert torch.equal(beside.wait(beside.run(lambda given: given + 1, x)), torch.full((3,), 2.0))
