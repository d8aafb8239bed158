"""Chips are read in every recorded form of their tools' output; a failing probe never disturbs a run."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab_utils.registry import load, members
from lab_utils.telemetry import chips, jsonl
from lab_utils.telemetry.chips import ChipReading, ChipSampler, aggregate
from lab_utils.telemetry.names import lookup
from lab_utils.telemetry.probes import cpu, cuda, npu

RECORDED = Path(__file__).parent / "npu_smi"


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.txt").read_text()


# -- npu-smi -------------------------------------------------------------------------------------------


def test_a_910c_table_has_a_reading_a_die_and_power_a_package():
    found = npu.parse_table(recorded("a3_25"))
    assert [(r.index, r.more["npu"], r.more["chip"]) for r in found] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 1, 1),
    ]
    assert [r.power for r in found] == [306.2, None, 298.8, None]
    assert [r.util for r in found] == [13.0, 12.0, 90.0, None]
    assert (found[0].used_mib, found[0].total_mib, found[0].temp) == (63495.0, 65536.0, 44.0)
    assert found[3].more["health"] == "Warning"
    metrics = aggregate(found)
    assert metrics["chip/power"] == pytest.approx((306.2 + 298.8) / 2)
    assert metrics["chip/power_total"] == pytest.approx(306.2 + 298.8)  # die 1 reports with die 0
    assert metrics["chip/unhealthy"] == 1.0
    assert metrics["chip/util_mean"] == pytest.approx((13 + 12 + 90) / 3) and metrics["chip/util_min"] == 12.0
    assert metrics["chip/hbm_frac"] == pytest.approx(63495 / 65536) and metrics["chip/temp_max"] == 47.0


def test_a_910b_table_without_phy_id_and_with_a_warning_before_it():
    found = npu.parse_table(recorded("a2_25"))
    assert [(r.name, r.power, r.temp, r.util) for r in found] == [
        ("910B4-1", 91.5, 38.0, 0.0),
        ("910B4-1", 210.0, 52.0, 77.0),
    ]
    assert found[1].used_mib / found[1].total_mib == 0.5


def test_the_wider_table_of_26_is_read_alike():
    found = npu.parse_table(recorded("a3_26"))
    assert [(r.util, r.used_mib, r.power) for r in found] == [(3.0, 3400.0, 171.0), (5.0, 2970.0, None)]


@pytest.mark.parametrize(
    "name, expected", [("usages_910b", [(25, 0.05)]), ("usages_a3", [(10, 0.05), (30, 0.5)])]
)
def test_usages_close_each_block_with_its_chip_id(name, expected):
    found = npu.parse_key_values(recorded(name))
    assert [(r.util, r.used_mib / r.total_mib) for r in found] == [(u, pytest.approx(f)) for u, f in expected]
    assert [r.more["chip"] for r in found] == [str(i) for i in range(len(expected))]


def test_common_opens_each_block_with_its_chip_id_and_the_controller_is_no_chip():
    (chip,) = npu.parse_key_values(recorded("common_910b"))
    assert (chip.util, chip.temp, chip.power, chip.more["npu"]) == (25.0, 38.0, 91.8, "2")
    assert aggregate([chip])["chip/hbm_frac"] == pytest.approx(0.05)


def test_values_without_a_block_are_one_chip():
    (chip,) = npu.parse_key_values("\tAicore Usage Rate(%)           : 7\n\tHBM Usage Rate(%)  : Failed\n")
    assert chip.util == 7.0 and chip.used_mib is None


@pytest.mark.parametrize(
    "text", ["", "npu-smi: command failed\n", "| a | b |\n| 0 | OK | 1 |\n", "\x00\xff|||"]
)
def test_text_that_is_no_table_has_no_chips(text):
    assert npu.parse_table(text) == [] and npu.parse_key_values(text) == []


def test_a_table_that_is_not_understood_falls_back_to_key_values():
    asked = []

    def smi(*words):
        asked.append(words)
        if words == ("info",):
            return "| NPU Util(%) | another | layout |\n"
        if words == ("info", "-l"):
            return "\tTotal Count    : 2\n\tNPU ID           : 2\n\tNPU ID          : 5\n"
        kind = words[2]
        assert words == ("info", "-t", kind, "-i", words[-1]) and words[-1] in ("2", "5")
        return recorded("common_910b" if kind == "common" else "usages_910b")

    probe = npu.NpuProbe(None, smi)
    first, second = probe.read()
    assert (first.index, second.index, first.power) == (0, 1, 91.8)
    # `common` knows the share alone; `usages` knows of how much, and is asked once.
    assert (first.used_mib, first.total_mib) == (pytest.approx(0.05 * 65536), 65536)
    probe.read()
    assert [words[2] for words in asked if len(words) > 2].count("usages") == 2


@pytest.mark.parametrize(
    "value, expected", [(None, [0, 1, 2, 3]), ("", [0, 1, 2, 3]), ("2,0", [2, 0]), ("1-3", [1, 2, 3])]
)
def test_only_visible_devices_count(monkeypatch, value, expected):
    assert npu.visible(4, value) == expected
    if value:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", value)
    else:
        monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    found = npu.NpuProbe(2, lambda *_: recorded("a3_25")).read()
    assert [r.index for r in found] == expected[:2]


# -- cuda, cpu -----------------------------------------------------------------------------------------


class Nvml:
    """Two boards; the second knows neither its power nor its utilisation."""

    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    remapped = (0, 0, 0, 0)  # corrected, uncorrected, pending, failed
    errors = 0

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUtilizationRates(self, handle):
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=83, memory=20)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=2**30, total=2**32)

    def nvmlDeviceGetPowerUsage(self, handle):
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return 412_500

    def nvmlDeviceGetName(self, handle):
        return b"Test Board"

    def nvmlDeviceGetTemperature(self, handle, kind):
        return 61 + handle

    def nvmlDeviceGetRemappedRows(self, handle):
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return self.remapped

    def nvmlDeviceGetTotalEccErrors(self, handle, kind, since):
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return self.errors


def test_a_board_that_does_not_know_its_power_is_left_out_of_the_mean(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    metrics = aggregate(cuda.CudaProbe(Nvml(), None).read())
    assert metrics == {
        "chip/util_mean": 83.0,
        "chip/util_min": 83.0,
        "chip/hbm_frac": 0.25,
        "chip/power": 412.5,
        "chip/power_total": 412.5,
        "chip/temp_max": 62.0,
        "chip/unhealthy": 0.0,
    }


@pytest.mark.parametrize(
    "rows, errors, said",
    [
        ((0, 0, 0, 0), 0, "OK"),
        ((4, 0, 1, 0), 0, "Reset needed"),
        ((4, 1, 0, 0), 2, "Uncorrected memory errors"),
        ((4, 9, 1, 1), 2, "Row remapping failed"),
    ],
)
def test_a_boards_health_is_that_of_its_memory(monkeypatch, rows, errors, said):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml()
    nvml.remapped, nvml.errors = rows, errors
    first, second = cuda.CudaProbe(nvml, None).read()
    assert first.more["health"] == said and second.more["health"] is None
    assert aggregate([first])["chip/unhealthy"] == float(said != "OK")
    assert "chip/unhealthy" not in aggregate([second]) and "health" not in second.row()


@pytest.mark.parametrize(
    "value, expected",
    [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("", []), ("0,7,1", [0]), ("GPU-ab12", ["GPU-ab12"])],
)
def test_visible_cuda_devices_follow_cudas_own_rule(value, expected):
    assert cuda.visible(2, value) == expected


BUSY = """
import sys, time
from lab_utils.telemetry.probes.cpu import CpuProbe
probe = CpuProbe(1)
probe.share = 1.0
probe.read()
end = time.process_time() + 0.4
while time.process_time() < end:
    if sys.argv[1] == "idle":
        time.sleep(0.5)
        break
print(probe.read()[0].util)
"""


def test_cpu_use_is_the_processes_own_and_not_the_hosts():
    def measure(what):
        kept = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
        done = subprocess.run(
            [sys.executable, "-c", BUSY, what], capture_output=True, text=True, check=True, env=kept
        )
        return float(done.stdout)

    assert measure("idle") < 20 < 30 < measure("busy")


def test_a_cpu_probe_reads_memory_and_has_no_power():
    reading = cpu.CpuProbe(2).read()[0]
    assert 0 < reading.used_mib < reading.total_mib and reading.power is None and reading.util is None


# -- every member, the sampler -------------------------------------------------------------------------


@pytest.mark.parametrize("health, counted", [("OK", 0), ("Normal", 0), ("Alarm", 1), ("Critical", 1)])
def test_only_chips_that_complain_are_unhealthy(health, counted):
    said, silent = ChipReading(0, more={"health": health}), ChipReading(1, more={"health": "UNKNOWN"})
    assert aggregate([said, silent])["chip/unhealthy"] == counted
    assert "chip/unhealthy" not in aggregate([silent])


@pytest.mark.parametrize("name", members(chips.PROBES))
def test_every_probe_counts_its_chips_without_a_driver_and_without_torch(name):
    code = f"from lab_utils.telemetry.chips import count; import sys; print(count({name!r}), "
    code += "'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, torch = done.stdout.split()
    assert int(number) >= 0 and torch == "False"
    module = load(chips.PROBES, name)
    assert callable(module.make) and callable(module.count)


def test_aggregates_are_described_metrics():
    full = ChipReading(0, util=1, used_mib=1, total_mib=2, power=1, temp=1, tx=1, rx=1, more={"health": "OK"})
    assert len(aggregate([full])) == 9 and all(lookup(key) for key in aggregate([full]))
    assert all(lookup(key) for key in ("chip/energy_kwh", "perf/joules_per_token"))
    assert aggregate([]) == {} and aggregate([ChipReading(0)]) == {}


class Probe:
    min_interval = 0.01

    def __init__(self, failures: int = 0, hang: threading.Event | None = None):
        self.failures, self.hang, self.reads = failures, hang, 0

    def read(self):
        self.reads += 1
        if self.hang is not None:
            self.hang.wait(20)
        if self.reads <= self.failures:
            raise RuntimeError("driver busy")
        return [ChipReading(0, "x", util=50.0, power=None)]


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_samples_reach_the_file_and_the_latest_metrics(tmp_path):
    with ChipSampler("cpu", 0.02, tmp_path, probe=Probe()) as sampler:
        wait_for(lambda: len(list(jsonl.read(tmp_path / "chips" / "node-0.jsonl"))) >= 2)
        assert sampler.latest() == {"chip/util_mean": 50.0, "chip/util_min": 50.0}
    row = next(jsonl.read(tmp_path / "chips" / "node-0.jsonl"))
    assert row["chips"] == [{"index": 0, "name": "x", "util": 50.0}] and row["time"] > 1e9


def test_a_failing_probe_is_asked_again_with_one_warning(tmp_path, capsys):
    probe = Probe(failures=2)
    with ChipSampler("npu", 0.02, tmp_path, probe=probe) as sampler:
        assert sampler.latest() == {}
        wait_for(lambda: sampler.latest() != {})
    assert probe.reads >= 3
    assert [
        line for line in capsys.readouterr().err.splitlines() if "driver busy" in line
    ] and sampler.failures == 0


def test_a_hanging_probe_does_not_hold_up_the_end_of_the_run(tmp_path):
    release = threading.Event()
    sampler = ChipSampler("npu", 0.02, tmp_path, probe=Probe(hang=release)).start()
    started = time.monotonic()
    assert sampler.latest() == {}
    sampler.stop()
    release.set()
    assert time.monotonic() - started < 4


def test_a_missing_driver_is_no_error_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with ChipSampler("npu", 0.02, tmp_path) as sampler:
        wait_for(lambda: sampler.failures > 0)
    assert sampler.latest() == {} and "the run goes on" in capsys.readouterr().err


def test_an_old_sample_says_nothing_about_now(monkeypatch):
    sampler = ChipSampler("cpu", 0.02, None, probe=Probe())
    assert sampler.sample() == sampler.latest() != {}
    later = time.monotonic() + 3600
    monkeypatch.setattr(chips.time, "monotonic", lambda: later)
    assert sampler.latest() == {}


# -- several nodes -------------------------------------------------------------------------------------


class Dies:
    """A node with dies of a given use; each package of two reports its power once."""

    min_interval = 0.01

    def __init__(self, util: float, dies: int = 4, power: float = 300.0):
        self.util, self.dies, self.power = util, dies, power

    def read(self):
        return [
            ChipReading(
                i, "die", util=self.util, power=self.power if i % 2 == 0 else None, more={"health": "OK"}
            )
            for i in range(self.dies)
        ]


def test_node_0_speaks_for_the_chips_of_all_nodes(tmp_path):
    others = [ChipSampler("npu", 1, tmp_path, node=k, probe=Dies(10.0 * k)) for k in (1, 2)]
    assert [sampler.sample()["chip/util_mean"] for sampler in others] == [10.0, 20.0]
    heard = []
    first = ChipSampler("npu", 1, tmp_path, probe=Dies(90.0, dies=8), listener=heard.append)
    metrics = first.sample()
    assert metrics["chip/util_mean"] == pytest.approx((8 * 90 + 4 * 10 + 4 * 20) / 16)
    assert metrics["chip/util_min"] == 10.0 and metrics["chip/power_total"] == 8 * 300.0
    assert metrics["chip/power"] == 300.0 and first.latest() == metrics
    assert sorted(heard[0]) == [0, 1, 2] and len(heard[0][0]["chips"]) == 8
    # Each node's file has its own chips alone.
    own = next(jsonl.read(tmp_path / "chips" / "node-2.jsonl"))
    assert own["chip/util_mean"] == 20.0 and own["chip/power_total"] == 600.0 and len(own["chips"]) == 4


def test_a_node_that_fell_silent_is_left_out_but_what_it_spent_stays(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(chips.time, "time", lambda: now[0])
    silent, first = (ChipSampler("npu", 1, tmp_path, node=k, probe=Dies(50.0 - k)) for k in (1, 0))
    for _ in range(3):
        silent.sample()
        metrics = first.sample()
        now[0] += 2.0
    assert metrics["chip/util_min"] == 49.0
    assert metrics["chip/energy_kwh"] == pytest.approx(2 * 600.0 * 4.0 / 3.6e6)
    for _ in range(40):
        metrics = first.sample()
        now[0] += 2.0
    assert metrics["chip/util_min"] == 50.0
    assert metrics["chip/energy_kwh"] == pytest.approx(600.0 * (4.0 + 84.0) / 3.6e6)


def test_a_resumed_run_goes_on_counting_its_energy(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(chips.time, "time", lambda: now[0])
    for _attempt in range(2):
        sampler = ChipSampler("npu", 1, tmp_path, probe=Dies(50.0))
        for _ in range(5):
            metrics = sampler.sample()
            now[0] += 1.0
        now[0] += 3600.0
    assert metrics["chip/energy_kwh"] == pytest.approx(2 * 600.0 * 4.0 / 3.6e6)
    marked = [row.get("first", False) for row in jsonl.read(tmp_path / "chips" / "node-0.jsonl")]
    assert marked == [True, *[False] * 4] * 2


def test_energy_a_token_needs_power_and_speed():
    values = {"chip/power_total": 1200.0, "perf/tokens_per_s": 400.0}
    assert chips.joules_per_token(values) == {"perf/joules_per_token": 3.0}
    assert chips.joules_per_token({"perf/tokens_per_s": 400.0}) == {}
    assert chips.joules_per_token({"chip/power_total": 1200.0}) == {}


def test_without_power_there_is_no_energy(tmp_path):
    metrics = ChipSampler("cpu", 1, tmp_path, probe=Probe()).sample()
    assert metrics == {"chip/util_mean": 50.0, "chip/util_min": 50.0}


def test_the_cost_of_a_sample_is_measured_where_it_is_paid():
    class Busy(Probe):
        def read(self):
            end = time.thread_time() + 0.004
            while time.thread_time() < end:
                pass
            return super().read()

    class Waiting(Probe):
        def read(self):
            time.sleep(0.02)
            return super().read()

    from lab_utils.telemetry.cost import measure

    busy, waiting = (measure("cpu", samples=5, interval=1.0, probe=p) for p in (Busy(), Waiting()))
    assert busy["cpu_ms"] >= 4.0 and busy["share"] == pytest.approx(busy["cpu_ms"] / 1000)
    assert waiting["wall_ms"] >= 20.0 and waiting["cpu_ms"] < waiting["wall_ms"] / 2
    assert busy["bytes"] > 20 and busy["chips"] == 1
    several = measure("cpu", samples=2, nodes=3, probe=Probe())
    assert several["nodes"] == 3
