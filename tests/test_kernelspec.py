"""The login node's kernel: installed, started by Jupyter's own client, and what it can and can't see."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab_utils.accelerators import _hidden
from lab_utils.errors import RunError
from lab_utils.panels import kernelspec


def content(folder: Path) -> dict:
    return json.loads((folder / "kernel.json").read_text())


@pytest.fixture
def bare(monkeypatch):
    """Nothing of the site in the environment."""
    for key in kernelspec.PASSED_ON:
        monkeypatch.delenv(key, raising=False)


def run_in(prefix: Path, name: str, code: str) -> dict:
    """The JSON that a cell prints in a kernel that is installed below ``prefix``."""
    from jupyter_client import KernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    manager = KernelManager(
        kernel_name=name,
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(prefix / "share" / "jupyter" / "kernels")]),
    )
    manager.start_kernel()
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=120)
        printed: list[str] = []

        def hear(message: dict) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = client.execute_interactive(code, timeout=120, output_hook=hear)
        assert reply["content"]["status"] == "ok", reply["content"]
        return json.loads("".join(printed))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


CODE = """
import json, os, sys
import lab_utils
from lab_utils import Recipe, launch, list_runs
heavy = [m for m in ("torch", "torch_npu", "colossalai", "wandb", "lab_utils.widgets.form") if m in sys.modules]
print(json.dumps({"heavy": heavy, "python": sys.executable, "environment": dict(os.environ)}))
"""


def test_the_kernel_starts_light_with_its_environment_and_no_device(tmp_path, bare, monkeypatch):
    monkeypatch.setenv("ASCENT_RUNS", "relative/runs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    folder = kernelspec.install(prefix=str(tmp_path), env={"WANDB_BASE_URL": "http://wandb.hall:8080"})
    found = run_in(tmp_path, "ascent", CODE)
    assert found["heavy"] == []
    assert os.path.samefile(found["python"], sys.executable)
    environment = found["environment"]
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] == environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    assert environment["WANDB_MODE"] == "offline" and environment["HF_HUB_OFFLINE"] == "1"
    assert environment["WANDB_BASE_URL"] == "http://wandb.hall:8080", "--env wins over the template"
    assert environment["ASCENT_RUNS"] == str(Path.cwd() / "relative" / "runs")
    assert (
        Path(content(folder)["argv"][0]).is_absolute() and folder == tmp_path / "share/jupyter/kernels/ascent"
    )


def test_cann_is_sourced_by_the_wrapper_only_where_it_was_asked_for(tmp_path, bare):
    script = tmp_path / "set_env.sh"
    script.write_text('export ASCEND_HOME_PATH=/opt/cann LD="${LD_NOT_SET}/lib"\n')
    folder = kernelspec.install("with-cann", prefix=str(tmp_path), cann=str(script))
    code = 'import json, os; print(json.dumps({k: os.environ.get(k) for k in ("ASCEND_HOME_PATH", "ASCENT_KERNEL")}))'
    assert run_in(tmp_path, "with-cann", code) == {"ASCEND_HOME_PATH": "/opt/cann", "ASCENT_KERNEL": "1"}
    assert content(folder)["argv"][:3] == ["/bin/bash", str(folder / "with_cann.sh"), str(script)]
    plain = kernelspec.install(prefix=str(tmp_path))
    assert content(plain)["argv"][0] == sys.executable and not (plain / "with_cann.sh").exists()


def test_a_wrapper_without_cann_says_what_is_missing(tmp_path):
    wrapper = Path(kernelspec.__file__).parents[2] / "kernels" / "jupyter" / kernelspec.WRAPPER
    done = subprocess.run([wrapper, tmp_path / "gone.sh", "true"], capture_output=True, text=True)
    assert done.returncode == 1 and "gone.sh is not there" in done.stderr


def test_install_replaces_its_own_and_nobody_elses(tmp_path, bare):
    first = kernelspec.install(prefix=str(tmp_path), env={"A": "1"})
    assert kernelspec.install(prefix=str(tmp_path)) == first and "A" not in content(first)["env"]
    other = tmp_path / "share/jupyter/kernels/theirs"
    other.mkdir()
    (other / "kernel.json").write_text('{"argv": [], "metadata": {}}')
    with pytest.raises(RunError, match="holds another kernel"):
        kernelspec.install("theirs", prefix=str(tmp_path))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"user": True, "prefix": "/x"}, "exclude each other"),
        ({"name": "a b"}, "expected letters"),
        ({"cann": "/nowhere/set_env.sh"}, "there is no such file"),
    ],
)
def test_what_cannot_be_installed_is_one_sentence(tmp_path, options, message):
    with pytest.raises(RunError, match=message):
        kernelspec.install(**{"prefix": str(tmp_path), **options})


def test_the_commands_install_show_and_remove(tmp_path, monkeypatch):
    def lab(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lab_utils.cli", "kernelspec", *words]
        return subprocess.run(command, capture_output=True, text=True)

    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    assert "lab kernelspec install" in lab("show", "--name", "mine").stderr
    done = lab(
        "install", "--prefix", str(tmp_path), "--name", "mine", "--env", "ASCENT_RUNS=/data/runs", "--json"
    )
    assert json.loads(done.stdout)["env"]["ASCENT_RUNS"] == "/data/runs"
    assert "ASCENT_RUNS=/data/runs" in lab("show", "--name", "mine").stdout
    assert lab("remove", "--prefix", str(tmp_path), "--name", "mine").returncode == 0
    assert not (tmp_path / "share/jupyter/kernels/mine").exists()
    gone = lab("remove", "--prefix", str(tmp_path), "--name", "mine")
    assert gone.returncode != 0 and len(gone.stderr.strip().splitlines()) == 1
    assert lab("install", "--prefix", str(tmp_path), "--env", "novalue").returncode != 0


def test_what_a_notebook_launches_sees_the_devices_again(monkeypatch):
    monkeypatch.setenv("ASCENT_KERNEL", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "2,3")  # given by a scheduler
    assert _hidden.setting("CUDA_VISIBLE_DEVICES") is None
    _hidden.show_devices()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ and "ASCENT_KERNEL" not in os.environ
    assert os.environ["ASCEND_RT_VISIBLE_DEVICES"] == "2,3"


def test_devices_that_a_person_has_hidden_stay_hidden(monkeypatch):
    monkeypatch.delenv("ASCENT_KERNEL", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _hidden.setting("CUDA_VISIBLE_DEVICES") == ""
    _hidden.show_devices()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_template_is_package_data_and_no_operator():
    import tomllib

    root = Path(kernelspec.__file__).parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert data["kernels"] == ["jupyter/*"]
    assert not (root / "kernels" / "jupyter" / "__init__.py").exists(), "operators are packages, this is none"
