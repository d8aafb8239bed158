"""lab doctor: what every check answers, and what each says of a machine that is as it should be, or isn't.

Machines are stand-ins: a folder with devices, drivers and mounts, and a PATH with scripts that print what the tools do.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab_utils.doctor import CHECKS, examine
from lab_utils.doctor._machine import Machine, Row
from lab_utils.doctor.checks import (
    cann,
    chips,
    clock,
    disk_speed,
    driver,
    files,
    hub,
    jupyter,
    limits,
    locale,
    network,
    packages,
    processes,
    site,
    slurm,
    space,
    torch,
    torch_npu,
    tracking,
)
from lab_utils.registry import load, members

A3 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.3.rc1                 Version: 25.3.rc1                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 306.2       44                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 13          0    / 0          63495/ 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | @HEALTH@ | -           44                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 12          0    / 0          62336/ 65536         |
+===========================+===============+====================================================+
"""
IDLE = """\
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
"""
BUSY = """\
+---------------------------+---------------+----------------------------------------------------------------------+
| NPU     Chip              | Process id    | Process name       | Process memory(MB)    | Process id in container |
+===========================+===============+======================================================================+
| 0       1                 | 632268        | python3.1          | 197                   | NA                      |
+===========================+===============+======================================================================+
"""


@pytest.fixture
def machine(tmp_path) -> Machine:
    """A login node without anything: no devices, no tools."""
    for folder in ("system/dev/shm", "system/proc", "bin", "runs"):
        (tmp_path / folder).mkdir(parents=True)
    environ = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    return Machine(tmp_path / "runs", system=tmp_path / "system", environ=environ)


def tool(machine: Machine, name: str, output: str = "", code: int = 0) -> None:
    """A stand-in for a command."""
    path = Path(machine.environ["PATH"]) / name
    path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{output}\nEND\nexit {code}\n")
    path.chmod(0o755)


def compute(machine: Machine, health: str = "OK           ", rest: str = IDLE) -> Machine:
    """Make it a compute node of one 910C package."""
    for index in (0, 1):
        (machine.system / f"dev/davinci{index}").touch()
    tool(machine, "npu-smi", A3.replace("@HEALTH@", health) + "\n" + rest)
    info = machine.system / "usr/local/Ascend/driver/version.info"
    info.parent.mkdir(parents=True, exist_ok=True)
    info.write_text("Version=25.3.rc1\nascendhal_version=7.35.23\n")
    return machine


def there(monkeypatch, module, **versions: str | None) -> None:
    monkeypatch.setattr(module, "installed", lambda name: versions.get(name))


def only(rows: list[Row]) -> Row:
    assert len(rows) == 1, rows
    return rows[0]


# -- every check ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", members(CHECKS))
@pytest.mark.parametrize("kind", ["here", "bare", "compute"])
def test_every_check_answers_rows_and_advises_where_it_fails(name, kind, machine, tmp_path):
    here = Machine.here(runs=tmp_path / "new" / "runs", quick=True)
    bare = Machine(machine.runs, quick=True, system=machine.system, environ=machine.environ)
    asked = {"here": here, "bare": bare, "compute": compute(bare)}[kind]
    module = load(CHECKS, name)
    assert isinstance(module.ORDER, int)
    rows = module.check(asked)
    assert rows
    for row in rows:
        assert set(row.as_dict()) == {"check", "ok", "found", "advice"}
        assert row.ok in (True, False, None) and row.check and row.found
        assert row.ok is not False or row.advice, f"{row.check} fails and says nothing to do"
        assert "\n" not in row.found + row.advice
        json.dumps(row.as_dict())
    assert not list(tmp_path.rglob(".doctor-*")), "nothing is left behind"


def test_a_check_that_raises_is_a_row_and_the_others_are_there(machine, monkeypatch):
    monkeypatch.setattr(space, "check", lambda machine: 1 / 0)
    rows = examine(machine=Machine(machine.runs, quick=True, system=machine.system, environ=machine.environ))
    broken = next(row for row in rows if row.check == "space")
    assert broken.ok is False and "ZeroDivisionError" in broken.found
    assert {"python", "chromium"} <= {row.check for row in rows}
    assert rows[0].check == "python", "in order"


def test_the_command_prints_json_and_its_exit_code_says_whether_a_check_failed(tmp_path):
    environ = {**os.environ, "WANDB_MODE": "online"}
    environ.pop("WANDB_BASE_URL", None)
    command = [sys.executable, "-m", "lab_utils.cli", "doctor", "--quick", "--json", "--runs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    rows = json.loads(done.stdout)
    assert all(set(row) == {"check", "ok", "found", "advice"} for row in rows)
    assert next(row for row in rows if row["check"] == "W&B")["ok"] is False and done.returncode == 1
    shown = subprocess.run([w for w in command if w != "--json"], capture_output=True, text=True, env=environ)
    assert "checks failed" in shown.stdout and "W&B" in shown.stdout.splitlines()[-1]


def test_the_doctor_itself_imports_no_torch(tmp_path):
    code = (
        "import sys; from lab_utils.doctor import examine; examine(quick=True, runs=sys.argv[1]); "
        "print([m for m in ('torch', 'torch_npu', 'colossalai', 'wandb', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- software ------------------------------------------------------------------------------------------------


def test_a_package_beside_its_pin_is_named_with_both_versions(machine, monkeypatch):
    pins = packages.pins()
    assert {"torch", "numpy", "colossalai"} <= pins.keys()
    monkeypatch.setattr(packages, "installed", lambda name: {**pins, "numpy": "1.0"}.get(name))
    summary, numpy = packages.check(machine)
    assert summary.ok is False and numpy.check == "package numpy"
    assert numpy.found == f"1.0, pinned {pins['numpy']}" and f"numpy=={pins['numpy']}" in numpy.advice


def test_beside_torch_npu_the_pin_of_torch_does_not_count(machine, monkeypatch):
    pins = packages.pins()
    monkeypatch.setattr(
        packages, "installed", lambda name: {**pins, "torch": "2.12.0", "torch_npu": "2.12.0"}.get(name)
    )
    assert only(packages.check(machine)).ok is True


def answers(monkeypatch, *results: tuple[int | None, str, str]) -> list[dict]:
    """Machine.python answers in turn; returns the variables that it was given."""
    asked, left = [], list(results)

    def python(self, code, **environ):
        asked.append({**self.environ, **environ})
        return left.pop(0)

    monkeypatch.setattr(Machine, "python", python)
    return asked


def test_torch_is_imported_as_a_user_would_and_the_login_nodes_trap_is_named(machine, monkeypatch):
    there(monkeypatch, torch, torch="2.12.0", torch_npu="2.12.0")
    trap = "Traceback\nRuntimeError: Failed to load the backend extension: torch_npu"
    asked = answers(monkeypatch, (1, "", trap), (0, "2.12.0 3.1", ""))
    row = only(torch.check(machine))
    assert row.ok is False and "backend extension" in row.found and "pip uninstall torch_npu" in row.advice
    assert (
        "TORCH_DEVICE_BACKEND_AUTOLOAD" not in asked[0] and asked[1]["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    )


@pytest.mark.parametrize(
    "answer, ok, word",
    [
        ((0, "2.13.0+cpu 2.5", ""), True, "2.5 s"),
        ((1, "", "ImportError: x"), False, "clean"),
        ((None, "", "no answer in 180 s"), False, "slow"),
    ],
)
def test_torch_without_torch_npu(machine, monkeypatch, answer, ok, word):
    there(monkeypatch, torch, torch="2.13.0")
    answers(monkeypatch, answer)
    row = only(torch.check(machine))
    assert row.ok is ok and word in row.found + row.advice


@pytest.mark.parametrize(
    "on_compute, versions, ok, word",
    [
        (False, {"torch": "2.13.0"}, True, "absent"),
        (False, {"torch": "2.13.0", "torch_npu": "2.13.0"}, False, "uninstall"),
        (True, {"torch": "2.12.0"}, False, "environment.yml"),
        (True, {"torch": "2.13.0", "torch_npu": "2.12.0"}, False, "one minor version"),
        (True, {"torch": "2.9.0", "torch_npu": "2.9.0.post2"}, True, "16 devices"),
    ],
)
def test_torch_npu_belongs_on_compute_nodes_and_to_its_torch(
    machine, monkeypatch, on_compute, versions, ok, word
):
    there(monkeypatch, torch_npu, **versions)
    answers(monkeypatch, (0, "2.9.0.post2 16", ""))
    row = only(torch_npu.check(compute(machine) if on_compute else machine))
    assert row.ok is ok and word in row.found + row.advice


@pytest.mark.parametrize(
    "file, text, version",
    [
        ("version.cfg", "# version: 1.0\nruntime_running_version=[7.3.0.1.231:8.5.0]\n", "8.5.0"),
        (
            "aarch64-linux/ascend_toolkit_install.info",
            "package_name=Ascend-cann-toolkit\nversion=9.1.0\n",
            "9.1.0",
        ),
        ("compiler/version.info", "Version=9.1.0\n", "9.1.0"),
        ("version.cfg", "nothing\n", None),
    ],
)
def test_the_release_of_cann_and_the_torch_npu_that_it_is_made_for(
    machine, monkeypatch, tmp_path, file, text, version
):
    home = tmp_path / "cann"
    (home / file).parent.mkdir(parents=True)
    (home / file).write_text(text)
    there(monkeypatch, cann, torch_npu="2.12.0")
    given = Machine(
        machine.runs, system=machine.system, environ={**machine.environ, "ASCEND_HOME_PATH": str(home)}
    )
    row = only(cann.check(compute(given)))
    assert row.ok is (version == "9.1.0")
    assert (version or "unknown release") in row.found
    if version == "8.5.0":
        assert "not 2.12.0" in row.advice


def test_cann_that_nobody_sourced(machine):
    assert only(cann.check(machine)).ok is None
    row = only(cann.check(compute(machine)))
    assert row.ok is False and "set_env.sh" in row.advice


# -- chips ---------------------------------------------------------------------------------------------------


def test_a_compute_node_shows_driver_chips_and_that_nobody_holds_them(machine):
    compute(machine)
    assert only(driver.check(machine)).found == "Ascend 25.3.rc1"
    assert only(chips.check(machine)) == Row("chips", True, "2 × Ascend910")
    assert only(processes.check(machine)).ok is True


def test_a_chip_that_is_not_well_takes_its_node_out(machine):
    row = only(chips.check(compute(machine, health="Alarm        ")))
    assert row.ok is False and "1 Alarm" in row.found and "drain" in row.advice


def test_a_process_on_a_chip_is_named(machine):
    row = only(processes.check(compute(machine, rest=BUSY)))
    assert row.ok is False and "python3.1 (632268) on 0:1" in row.found


def test_a_driver_that_does_not_answer(machine):
    compute(machine)
    tool(machine, "npu-smi", "dcmi module initialize failed. ret is -8005", code=1)
    assert only(driver.check(machine)).ok is False
    assert only(chips.check(machine)).ok is None, "said once"


def test_gpus_by_nvidia_smi(machine):
    (machine.system / "dev/nvidiactl").touch()
    tool(machine, "nvidia-smi", "H100, 0\nH100, 3")
    row = only(chips.check(machine))
    assert row.ok is False and row.found == "2 × H100, memory errors on 1"
    tool(machine, "nvidia-smi", "4711, python, 00000000:01:00.0")
    assert "python (4711)" in only(processes.check(machine)).found


# -- network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, left",
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth0", ["eth0"]),
        ("^docker,veth", ["eth0", "eth1", "ib0"]),
        ("^=eth0", ["eth1", "ib0", "docker0"]),
        ("wlan", []),
    ],
)
def test_interfaces_that_hccl_would_take(setting, left):
    assert network.chosen(setting, ["eth0", "eth1", "ib0", "docker0"]) == left


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.check: row for row in rows}


def with_environ(machine: Machine, **environ: str) -> Machine:
    return Machine(machine.runs, machine.peers, system=machine.system, environ={**machine.environ, **environ})


def test_an_interface_that_is_not_there(machine, monkeypatch):
    monkeypatch.setattr(network, "interfaces", lambda: {"eth0": "10.0.0.1"})
    row = by_name(network.check(with_environ(machine, HCCL_SOCKET_IFNAME="ib")))["network interface"]
    assert row.ok is False and "choose from eth0" in row.advice
    assert (
        by_name(network.check(with_environ(machine, HCCL_SOCKET_IFNAME="eth")))["network interface"].ok
        is True
    )


def test_a_host_name_that_leads_other_nodes_to_themselves(machine, monkeypatch):
    monkeypatch.setattr(network, "interfaces", lambda: {"eth0": "10.0.0.1"})
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda name, port: [(0, 0, 0, "", ("127.0.1.1", 0))])
    assert "/etc/hosts" in network._name().advice


def test_ports_that_are_taken_are_named(machine):
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = held.getsockname()[1]
        row = by_name(network.check(with_environ(machine, HCCL_HOST_SOCKET_PORT_RANGE=f"{port}-{port}")))[
            "ports of HCCL"
        ]
    assert row.ok is False and str(port) in row.found
    assert (
        by_name(network.check(with_environ(machine, HCCL_HOST_SOCKET_PORT_RANGE="auto")))["ports of HCCL"].ok
        is True
    )
    assert (
        by_name(network.check(with_environ(machine, HCCL_IF_BASE_PORT="many")))["ports of HCCL"].ok is False
    )


def test_peers_answer_or_do_not():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert network._peer(f"127.0.0.1:{port}").ok is True
    closed = network._peer(f"127.0.0.1:{port}")
    assert closed.ok is False and "closed" in closed.found
    assert network._peer("no-such-host.invalid:22").ok is False


# -- files ---------------------------------------------------------------------------------------------------

MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
shm /home/ram tmpfs rw 0 0
x /with\\040space lustre rw 0 0
"""


@pytest.mark.parametrize(
    "folder, found",
    [
        ("/root/runs", ("/", "ext4")),
        ("/home/me/runs", ("/home", "nfs4")),
        ("/home/ram/runs", ("/home/ram", "tmpfs")),
        ("/homely", ("/", "ext4")),
        ("/with space/x", ("/with space", "lustre")),
    ],
)
def test_the_mount_of_a_folder(folder, found):
    assert files.mount_of(Path(folder), MOUNTS) == found


@pytest.mark.parametrize(
    "kind, has_slurm, ok",
    [("lustre", True, True), ("ext4", False, True), ("ext4", True, False), ("tmpfs", False, False)],
)
def test_runs_belong_on_a_file_system_that_the_jobs_nodes_see(machine, kind, has_slurm, ok):
    (machine.system / "proc/mounts").write_text(f"x / {kind} rw 0 0\n")
    if has_slurm:
        tool(machine, "sinfo")
        (machine.system / "etc/slurm").mkdir(parents=True)
        (machine.system / "etc/slurm/slurm.conf").touch()
    row = by_name(files.check(machine))["file system"]
    assert row.ok is ok and kind in row.found


def test_a_good_folder_renames_and_locks(machine):
    rows = by_name(files.check(machine))
    assert rows["runs folder"].ok and rows["rename"].ok and rows["locks"].ok


def test_locks_that_let_two_in_are_found(machine, monkeypatch):
    monkeypatch.setattr(files, "_LOCK", "pass")  # what the other process finds where locks are ignored
    assert by_name(files.check(machine))["locks"].ok is False


def test_a_folder_that_cannot_be_written(machine):
    rows = by_name(files.check(Machine(Path("/proc/runs"), system=machine.system, environ=machine.environ)))
    assert rows["runs folder"].ok is False and "ASCENT_RUNS" in rows["runs folder"].advice


def test_disk_speed_is_measured_and_judged(machine, monkeypatch):
    monkeypatch.setattr(disk_speed, "SIZE", 8 * disk_speed.MIB)
    monkeypatch.setattr(disk_speed, "SLOW", 1.0)
    row = only(disk_speed.check(machine))
    assert row.ok is True and "MB/s, writing 8 MiB" in row.found
    monkeypatch.setattr(disk_speed, "SLOW", 1e15)
    assert only(disk_speed.check(machine)).ok is False


def test_space_that_runs_out(machine, monkeypatch):
    assert "GiB free" in only(space.check(machine)).found
    monkeypatch.setattr(space, "LEAST", 2**80)
    assert only(space.check(machine)).ok is False


@pytest.mark.parametrize("off, ok", [(0.0, True), (-60.0, False), (60.0, False)])
def test_clocks_that_differ(machine, monkeypatch, off, ok):
    import time

    monkeypatch.setattr(clock, "time", SimpleNamespace(time=lambda: time.time() + off))
    row = by_name(clock.check(machine))["clock"]
    assert row.ok is ok
    assert ok or float(row.found.split()[0]) == pytest.approx(-off, abs=5)


@pytest.mark.parametrize("leap, ok", [("Normal", True), ("Not synchronised", False)])
def test_the_time_server_by_chrony(machine, leap, ok):
    tool(machine, "chronyc", f"System time     : 0.000012 seconds fast of NTP time\nLeap status     : {leap}")
    assert by_name(clock.check(machine))["time server"].ok is ok


# -- modes, limits, tools ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environ, ok",
    [
        ({}, True),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_MODE": "online"}, False),
        ({"WANDB_MODE": "online", "WANDB_BASE_URL": "http://w"}, True),
    ],
)
def test_wandb_is_offline_or_has_a_server_of_ones_own(machine, environ, ok):
    assert only(tracking.check(with_environ(machine, **environ))).ok is ok


@pytest.mark.parametrize("value, word", [("1", "offline"), ("0", "online"), ("", "jobs are offline")])
def test_the_hubs_mode(machine, value, word):
    assert word in only(hub.check(with_environ(machine, HF_HUB_OFFLINE=value))).found


def test_a_locale_that_is_not_utf_8(machine, monkeypatch):
    answers(monkeypatch, (0, "ANSI_X3.4-1968 utf-8", ""))
    assert only(locale.check(machine)).ok is False


@pytest.mark.parametrize("soft, ok", [(512, False), (1024, None), (8192, True)])
def test_open_files(machine, monkeypatch, soft, ok):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (soft, 65536))
    row = by_name(limits.check(machine))["open files"]
    assert row.ok is ok and (ok or "ulimit -n 4096" in row.advice)


def test_locked_memory_matters_on_compute_nodes(machine, monkeypatch):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (65536, 65536))
    assert by_name(limits.check(machine))["locked memory"].ok is None
    assert by_name(limits.check(compute(machine)))["locked memory"].ok is False


def test_a_kernel_whose_interpreter_is_gone(machine, monkeypatch, tmp_path):
    from lab_utils.panels import kernelspec

    folder = kernelspec.install(prefix=str(tmp_path / "prefix"))
    monkeypatch.setattr(kernelspec, "installed", lambda: {"ascent": folder})
    assert by_name(jupyter.check(machine))["notebook kernel"].ok is True
    text = (folder / "kernel.json").read_text().replace(sys.executable, "/gone/python")
    (folder / "kernel.json").write_text(text)
    row = by_name(jupyter.check(machine))["notebook kernel"]
    assert row.ok is False and "/gone/python is gone" in row.found


@pytest.mark.parametrize("transport, ok", [("ipc", True), ("tcp", False), (None, None)])
def test_kernel_transport(machine, monkeypatch, tmp_path, transport, ok):
    if transport:
        setting = json.dumps({"KernelManager": {"transport": transport}})
        (tmp_path / "jupyter_server_config.json").write_text(setting)
    monkeypatch.setattr("jupyter_core.paths.jupyter_config_path", lambda: [str(tmp_path)])
    assert by_name(jupyter.check(machine))["kernel transport"].ok is ok


def test_slurms_partitions(machine):
    assert only(slurm.check(machine)).ok is None
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        tool(machine, name)
    tool(machine, "sinfo", "npu*|up|128|7-00:00:00|npu:16\nold|down|4|infinite|(null)")
    assert "no slurm.conf" in only(slurm.check(machine)).found
    (machine.runs / "slurm.conf").touch()
    known = with_environ(machine, SLURM_CONF=str(machine.runs / "slurm.conf"))
    assert only(slurm.check(known)).found == "1 partition up: npu* 128 nodes, 7-00:00:00, npu:16"
    tool(machine, "sinfo", "", code=1)
    assert only(slurm.check(known)).ok is False


def test_the_description_of_the_site(machine, tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text("fabric: HCCS\ncabinets: {A01: ['npu-*']}\n")
    row = only(site.check(with_environ(machine, ASCENT_SITE=str(path))))
    assert row.ok is True and "fabric, cabinets" in row.found
    path.write_text("fabricc: HCCS\n")
    row = only(site.check(with_environ(machine, ASCENT_SITE=str(path))))
    assert row.ok is False and "fabricc" in row.advice


def test_no_line_names_a_place_outside():
    """Advice is for machines without a link."""
    root = Path(__file__).parents[2] / "lab_utils" / "doctor"
    text = "".join(path.read_text() for path in root.rglob("*.py"))
    assert "http" not in text.replace("WANDB", "")
