"""The wheel, apart from everybody's torch; the ELF reader; the stand-in CANN and what it answers."""

import ctypes
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lab_utils.ascend import elf, stand_in, wheel
from lab_utils.ascend.wheel import NotPossibleHere

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_is_pinned_to_torchs_release():
    lines = (ROOT / "requirements-ascend.lock").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [f"torch_npu=={wheel.VERSION}"]
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"torch=={wheel.VERSION}" in pins


def test_setup_puts_the_wheel_where_it_is_looked_for(monkeypatch):
    monkeypatch.delenv("ASCENT_ASCEND_WHEEL", raising=False)
    assert wheel.folder() == Path(sys.prefix) / "ascend"
    assert "--target $(VENV)/ascend -r requirements-ascend.lock" in (ROOT / "Makefile").read_text()


def test_a_missing_or_other_wheel_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCENT_ASCEND_WHEEL", str(tmp_path))
    assert wheel.location() is None
    with pytest.raises(NotPossibleHere, match=r"holds no torch_npu.*pip install --no-deps --target"):
        wheel.required()
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu-2.12.0.dist-info").mkdir()
    with pytest.raises(NotPossibleHere, match=r"holds torch_npu 2\.12\.0, but"):
        wheel.required()
    (tmp_path / "torch_npu-2.12.0.dist-info").rename(tmp_path / f"torch_npu-{wheel.VERSION}.dist-info")
    assert wheel.location() == tmp_path


def test_names_are_read_from_an_elf_file(tmp_path, cann):
    source = tmp_path / "a.c"
    source.write_text(
        'int outside(int); int inside(int x) { return outside(x); }\nconst char *t = "aclFoundHere";'
    )
    library = tmp_path / "liba.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library, source, "-Wl,--no-as-needed", "-lm"], check=True
    )
    assert "outside" in elf.undefined(library) and "inside" not in elf.undefined(library)
    assert any(name.startswith("libm.so") for name in elf.needed(library))
    assert elf.texts(library, rb"acl[A-Z]\w+") == {"aclFoundHere"}
    with pytest.raises(ValueError, match="little-endian ELF"):
        elf.undefined(source)


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path, cann, monkeypatch):
    monkeypatch.setattr(stand_in.shutil, "which", lambda name: None)
    with pytest.raises(NotPossibleHere, match="no C compiler: install gcc"):
        stand_in.build(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "made-of").exists(), "a folder that is half done looks done"


def test_a_stand_in_that_is_there_is_not_built_again(cann, monkeypatch):
    monkeypatch.setattr(stand_in, "_compile", lambda *_: pytest.fail("built again"))
    stand_in.build(cann)


def test_it_has_every_name_that_the_wheel_asks_of_cann(cann):
    asked = stand_in._functions(wheel.required())
    assert 300 < len(asked) < 1000 and {"aclrtMalloc", "HcclAllReduce", "aclopCompileAndExecute"} <= asked
    library = ctypes.CDLL(str(cann / stand_in.LIBRARY))
    assert [name for name in sorted(asked) if not hasattr(library, name)] == []
    for name in stand_in._names_of_libraries(wheel.required()):
        assert (cann / name).exists()


def test_it_answers_with_devices_a_chip_and_memory_and_refuses_a_device_that_is_not_there(cann):
    library = ctypes.CDLL(str(cann / stand_in.LIBRARY))
    library.aclrtGetSocName.restype = ctypes.c_char_p
    count, free, total = ctypes.c_uint32(), ctypes.c_size_t(), ctypes.c_size_t()
    assert library.aclrtGetDeviceCount(ctypes.byref(count)) == 0 and count.value == stand_in.DEVICES
    assert (
        library.aclrtGetMemInfo(0, ctypes.byref(free), ctypes.byref(total)) == 0 and total.value == 64 << 30
    )
    assert library.aclrtGetSocName() == stand_in.SOC.encode()
    assert library.aclrtSetDevice(15) == 0 and library.aclrtSetDevice(16) == 107001


def test_a_childs_environment_hides_other_devices_and_what_a_site_has_set(cann, monkeypatch):
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "5")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    found = stand_in.environment(cann)
    assert found["LD_LIBRARY_PATH"].split(":")[0] == str(cann) and "HCCL_CONNECT_TIMEOUT" not in found
    assert found["PYTHONPATH"] == f"{wheel.required()}:/mine" and found["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.slow
def test_memory_of_the_stand_in_holds_what_is_put_into_it(child):
    code = (
        "import torch, torch_npu\n"
        "x = torch.arange(5.0).to('npu:2')\n"
        "print(x.device, x.cpu().tolist(), (x + x).cpu().shape[0])"
    )
    assert child(code).split("\n")[-2] == "npu:2 [0.0, 1.0, 2.0, 3.0, 4.0] 5"


@pytest.mark.slow
def test_torch_is_whole_without_the_stand_in():
    code = "import torch, importlib.util as u; print(u.find_spec('torch_npu'), torch.ones(2).sum().item())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "None 2.0"
