"""torch_npu: absent on a login node; on a compute node there, of torch's version, and able to load."""

from __future__ import annotations

from lab_utils.doctor._machine import Machine, Row, last_line
from lab_utils.doctor.checks.packages import installed

ORDER = 21
CODE = "import torch, torch_npu; print(torch_npu.__version__, torch.npu.device_count())"


def check(machine: Machine) -> list[Row]:
    version, torch = installed("torch_npu"), installed("torch")
    if not machine.has_npus:
        if version is None:
            return [Row("torch_npu", True, "absent, as it should be without NPUs")]
        advice = (
            "pip uninstall torch_npu: without CANN it makes `import torch` fail. It belongs on compute nodes."
        )
        return [Row("torch_npu", False, f"{version} on a machine without NPUs", advice)]
    if version is None:
        advice = "Make the environment of compute nodes: conda env create -f environment.yml."
        return [Row("torch_npu", False, "missing on a machine with NPUs", advice)]
    if torch is None or version.split(".post")[0].split(".")[:2] != torch.split(".")[:2]:
        advice = f"pip install --no-deps torch_npu=={torch}: the two must be of one minor version."
        return [Row("torch_npu", False, f"{version} beside torch {torch}", advice)]
    if machine.quick:
        return [Row("torch_npu", None, f"{version}, not imported (--quick)")]
    code, out, error = machine.python(CODE, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    if code == 0:
        return [Row("torch_npu", True, f"{version}, {out.split()[-1]} devices")]
    advice = "source CANN's set_env.sh (its line here says which), then see the first error in ~/ascend/log."
    return [Row("torch_npu", False, f"{version}, import fails: {last_line(error)}", advice)]
