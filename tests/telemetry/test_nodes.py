"""Each rank tells what is its own: the first everything, the first of another node its chips, the others nothing."""

import time
from types import SimpleNamespace

import pytest

from lab_utils.engine.parts import Telemetry, telemetry_of
from lab_utils.recipe import Recipe
from lab_utils.telemetry import jsonl
from lab_utils.telemetry.chips import ChipReading, ChipSampler
from lab_utils.telemetry.jsonl import JsonlSink
from lab_utils.telemetry.sinks import MultiSink

ACCELERATOR = SimpleNamespace(name="npu", device_name=lambda: "a die")
PEAK = SimpleNamespace(flops=None, source="")


class Dies:
    min_interval = 0.01

    def __init__(self, util, health="OK"):
        self.util, self.health = util, health

    def read(self):
        return [ChipReading(i, util=self.util, power=300.0, more={"health": self.health}) for i in range(2)]


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load("sft_tiny").with_changes({"tracking.wandb": "disabled", "tracking.chip_seconds": 0.02})


def place(monkeypatch, **variables):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize(
    "where, node",
    [
        ({}, 0),
        ({"RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}, 0),
        ({"RANK": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 2}, 2),
        ({"RANK": 6, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}, 3),  # started without torchrun's agent
    ],
)
def test_the_first_rank_of_each_node_samples_its_chips(tmp_path, monkeypatch, recipe, where, node):
    place(monkeypatch, **where)
    telemetry = telemetry_of(recipe, ACCELERATOR, SimpleNamespace(path=tmp_path))
    assert telemetry.node == node and telemetry.sampler.path == tmp_path / "chips" / f"node-{node}.jsonl"
    assert telemetry.sampler.chips == int(where.get("LOCAL_WORLD_SIZE", 1))
    assert [type(sink).__name__ for sink in telemetry.sinks.sinks] == (
        ["JsonlSink", "ConsoleSink"] if not node else []
    )


def test_other_ranks_tell_nothing(tmp_path, monkeypatch, recipe):
    place(monkeypatch, RANK=1, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, GROUP_RANK=0)
    run_dir = SimpleNamespace(path=tmp_path)
    telemetry = telemetry_of(recipe, ACCELERATOR, run_dir)
    telemetry.open(run_dir, recipe, ACCELERATOR, PEAK)
    telemetry.log(1, {"train/loss": 1.0})
    telemetry.close("succeeded")
    assert list(tmp_path.iterdir()) == []


def test_a_line_has_the_chips_of_all_nodes_and_the_energy_of_a_token(tmp_path, recipe):
    run_dir = SimpleNamespace(path=tmp_path)
    nodes = [
        Telemetry(
            MultiSink([JsonlSink()] if node == 0 else []),
            ChipSampler(
                "npu", 0.02, tmp_path, node=node, probe=Dies(40.0 + 20 * node, ["OK", "Alarm"][node])
            ),
            node,
        )
        for node in (0, 1)
    ]
    for telemetry in reversed(nodes):
        telemetry.open(run_dir, recipe, ACCELERATOR, PEAK)
        wait_for(lambda telemetry=telemetry: telemetry.sampler.latest().get("chip/energy_kwh"))
    wait_for(lambda: nodes[0].sampler.latest()["chip/util_mean"] == 50.0)
    for telemetry in nodes:
        telemetry.log(1, {"train/loss": 1.0, "perf/tokens_per_s": 400.0})
        telemetry.log(1, {"eval/loss": 1.0})
        telemetry.close("succeeded")
    line, evaluation = jsonl.read(tmp_path / "metrics.jsonl")
    assert line["chip/util_mean"] == 50.0 and line["chip/power_total"] == 1200.0
    assert line["perf/joules_per_token"] == 3.0 and line["chip/energy_kwh"] > 0
    assert "perf/joules_per_token" not in evaluation
    events = [row for row in jsonl.read(tmp_path / "events.jsonl") if row["kind"].startswith("alert")]
    assert [row["kind"] for row in events] == ["alert_unhealthy"] and "node 1: 0, 1" in events[0]["message"]
