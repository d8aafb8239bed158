"""The driver of the chips answers."""

from __future__ import annotations

from lab_utils.accelerators._cann import driver_version
from lab_utils.doctor._machine import Machine, Row

ORDER = 23


def check(machine: Machine) -> list[Row]:
    if machine.has_npus:
        version = driver_version(machine.system)
        if machine.which("npu-smi") is None:
            advice = (
                "npu-smi is not in PATH: add /usr/local/sbin, or in a container mount it with the driver."
            )
            return [Row("driver", False, f"Ascend {version or 'of an unknown release'}, no npu-smi", advice)]
        if machine.ask("npu-smi", "info") is None:
            advice = "npu-smi info fails or hangs: you are not in the group of /dev/davinci*, or the driver is damaged."
            return [Row("driver", False, f"Ascend {version or 'of an unknown release'}", advice)]
        return [Row("driver", True, f"Ascend {version or 'of an unknown release'}")]
    if machine.has_gpus:
        text = machine.ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if text is None:
            return [
                Row(
                    "driver",
                    False,
                    "nvidia-smi fails or is missing",
                    "Have the administrator look at the driver.",
                )
            ]
        return [Row("driver", True, f"NVIDIA {text.split()[0] if text.split() else 'of an unknown release'}")]
    return [Row("driver", None, "no chips on this machine")]
