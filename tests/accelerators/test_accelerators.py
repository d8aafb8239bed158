"""Every device kind, as far as this machine can be asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab_utils.accelerators import AUTO_ORDER, Accelerator, Peak, accelerator_class, get_accelerator
from lab_utils.accelerators.cpu import measure_matmul
from lab_utils.accelerators.cuda import data_sheet_peak
from lab_utils.accelerators.npu import soc_peak
from lab_utils.errors import LayoutError
from lab_utils.registry import members

KINDS = members("lab_utils.accelerators")


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASCENT_ACCELERATOR", raising=False)
    monkeypatch.setenv("ASCENT_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", KINDS)
def test_kinds_conform(name: str) -> None:
    kind = accelerator_class(name)
    assert issubclass(kind, Accelerator) and not kind.__abstractmethods__
    assert kind.name == name and kind.backend in ("gloo", "nccl", "hccl")
    assert isinstance(kind.available(), bool)
    if not kind.available():
        with pytest.raises(LayoutError, match=name):
            get_accelerator(name)
        return
    threads = torch.get_num_threads()
    device = get_accelerator(name)
    assert device.setup(0, threads=1).type == name
    torch.set_num_threads(threads)
    memory = device.memory()
    assert 0 < memory.allocated_peak <= memory.capacity
    device.reset_memory_peak()
    device.synchronize()
    assert device.device_name()


@pytest.mark.parametrize("name", [k for k in KINDS if accelerator_class(k).available()])
def test_generators_are_put_back(name: str) -> None:
    import random

    import numpy

    device = get_accelerator(name)
    device.seed(2**40 + 5)
    state = json.loads(json.dumps(device.rng_state()))

    def draw() -> tuple:
        where = torch.device(name)
        return (
            random.random(),
            float(numpy.random.rand()),
            float(torch.rand(())),
            float(torch.rand((), device=where)),
        )

    first = draw()
    assert draw() != first
    device.set_rng_state(state)
    assert draw() == first


def test_auto_takes_the_first_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AUTO_ORDER == ("npu", "cuda", "cpu")
    monkeypatch.setattr(accelerator_class("npu"), "available", classmethod(lambda cls: False))
    monkeypatch.setattr(accelerator_class("cuda"), "available", classmethod(lambda cls: True))
    assert get_accelerator("auto").name == "cuda"
    monkeypatch.setattr(accelerator_class("cuda"), "available", classmethod(lambda cls: False))
    assert get_accelerator().name == "cpu"


def test_the_environment_forces_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCENT_ACCELERATOR", "cpu")
    assert get_accelerator("npu").name == "cpu"
    monkeypatch.setenv("ASCENT_ACCELERATOR", "npuu")
    with pytest.raises(LayoutError, match="did you mean 'npu'"):
        get_accelerator("cpu")


def test_asking_imports_neither_torch_nor_torch_npu() -> None:
    code = (
        "import sys; from lab_utils.accelerators import accelerator_class as kind;"
        "assert 'torch' not in sys.modules; kind('npu').available();"
        "sys.exit('torch' in sys.modules or 'torch_npu' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_cpu_peak_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = get_accelerator("cpu")
    peak = device.peak("float32")
    assert peak.flops > 1e9 and "measured" in peak.source
    (file,) = tmp_path.glob("peak-*.json")
    monkeypatch.setattr(
        "lab_utils.accelerators.cpu.measure_matmul", lambda dtype: pytest.fail("measured again")
    )
    assert device.peak("float32") == peak
    file.write_text("{ torn")
    monkeypatch.setattr("lab_utils.accelerators.cpu.measure_matmul", lambda dtype: 5.0)
    assert device.peak("float32").flops == 5.0


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASCENT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("lab_utils.accelerators.cpu.measure_matmul", lambda dtype: 7.0)
    assert get_accelerator("cpu").peak("float32").flops == 7.0


def test_a_product_is_counted_as_two_flops_a_multiply() -> None:
    assert 1e8 < measure_matmul("float32", edge=128, seconds=0.05) < 1e13


def test_published_peaks() -> None:
    assert data_sheet_peak("NVIDIA H200", "bfloat16").flops == pytest.approx(989.4e12)
    assert data_sheet_peak("NVIDIA H100 PCIe", "bfloat16").flops == pytest.approx(756e12)
    assert data_sheet_peak("NVIDIA H20", "bfloat16").flops == pytest.approx(148e12)
    assert soc_peak("Ascend910_9382", "bfloat16").flops == pytest.approx(376e12)
    for unknown in (data_sheet_peak("Some GPU", "bfloat16"), soc_peak("Ascend910B4", "bfloat16")):
        assert isinstance(unknown, Peak) and unknown.flops is None
