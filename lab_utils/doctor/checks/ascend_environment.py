"""Variables of a compute node of Ascend that would spoil a job; launch scripts set what isn't set."""

from __future__ import annotations

from lab_utils.ascend.environment import problems
from lab_utils.doctor._machine import Machine, Row

ORDER = 31
SHOWN = (
    "HCCL_",
    "ASCEND_RT_",
    "PYTORCH_NPU_",
    "TASK_QUEUE_ENABLE",
    "CPU_AFFINITY_CONF",
    "TORCH_NPU_",
    "TORCH_HCCL_",
)


def check(machine: Machine) -> list[Row]:
    found = sorted(name for name in machine.environ if name.startswith(SHOWN))
    if not machine.has_npus and not found:
        return [Row("HCCL environment", None, "none, and no NPUs")]
    rows = [Row(f"HCCL environment: {p.name}", False, p.found, p.advice) for p in problems(machine.environ)]
    if rows:
        return rows
    named = ", ".join(f"{name}={machine.environ[name]}" for name in found[:6])
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return [
        Row(
            "HCCL environment",
            True,
            f"{named}{more}" if found else "nothing set: launch scripts set what is needed",
        )
    ]
