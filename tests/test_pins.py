"""pyproject.toml, requirements.lock and environment.yml name the same versions, but for the torch pair of Ascend."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
ASCEND_PAIR = {"torch", "torch-npu"}


def _pins(lines: list[str]) -> dict[str, str]:
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0])
    return {name.lower().replace("_", "-"): version for name, version in pins.items()}


def _pyproject(*groups: str) -> dict[str, str]:
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = tree["project"]["dependencies"] + [line for g in groups for line in tree["dependency-groups"][g]]
    assert all("==" in line for line in lines), "every direct dependency is pinned"
    return _pins(lines)


def _environment() -> list:
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_the_lock_holds_every_pin_of_pyproject():
    lock = _pins((ROOT / "requirements.lock").read_text().splitlines())
    wanted = _pyproject("dev", "engine")
    assert {name: lock.get(name) for name in wanted} == wanted


def test_the_conda_environment_repeats_the_pins_but_for_the_torch_pair():
    found = _pins(next(d["pip"] for d in _environment() if isinstance(d, dict)))
    wanted = _pyproject("dev")
    assert {k: v for k, v in found.items() if k not in ASCEND_PAIR} == {
        k: v for k, v in wanted.items() if k not in ASCEND_PAIR
    }
    assert found["torch"] == found["torch-npu"], "torch_npu needs the torch of its own version"


def test_the_conda_environment_takes_cann_from_the_ascend_channel():
    tree = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert tree["channels"][0].startswith("https://") and "ascend" in tree["channels"][0]
    cann = [d.split("==") for d in _environment() if isinstance(d, str) and d.startswith("cann-")]
    assert {version for _, version in cann} == {"9.1.0"} and "cann-toolkit" in {name for name, _ in cann}


def test_the_plain_environment_has_no_torch_npu():
    assert "torch-npu" not in _pins((ROOT / "requirements.lock").read_text().splitlines())
