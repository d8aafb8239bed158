"""torch can be imported, in a process of its own: where torch_npu is installed without CANN, that import fails."""

from __future__ import annotations

from lab_utils.doctor._machine import Machine, Row, last_line
from lab_utils.doctor.checks.packages import installed

ORDER = 20
CODE = "import time; t = time.time(); import torch; print(torch.__version__, round(time.time() - t, 1))"


def check(machine: Machine) -> list[Row]:
    version = installed("torch")
    if version is None:
        return [Row("torch", False, "missing", "make setup installs it.")]
    if machine.quick:
        return [Row("torch", None, f"{version}, not imported (--quick)")]
    # As a notebook or a script of the user's would import it, whatever this process has set.
    machine_as_is = {
        key: value for key, value in machine.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"
    }
    plain = Machine(machine.runs, environ=machine_as_is, system=machine.system)
    code, out, error = plain.python(CODE)
    if code == 0:
        number, seconds = out.split()
        return [Row("torch", True, f"{number}, imported in {seconds} s")]
    found = f"{version}, import fails: {last_line(error)}"
    if installed("torch_npu") and code is not None:
        again, _, _ = plain.python(CODE, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        if again == 0:
            return [
                Row(
                    "torch",
                    False,
                    found,
                    "torch_npu registers itself with torch and needs CANN, which this machine lacks: on a login node "
                    "pip uninstall torch_npu; on a compute node source CANN's set_env.sh. Until then "
                    "TORCH_DEVICE_BACKEND_AUTOLOAD=0 helps.",
                )
            ]
    if code is None:
        return [
            Row(
                "torch",
                False,
                found,
                "The file system of the environment is slow or hangs: see the disk's lines.",
            )
        ]
    return [Row("torch", False, found, "Install it again: make clean setup.")]
