"""CANN: named by ASCEND_HOME_PATH, and of a release that torch_npu is made for."""

from __future__ import annotations

from pathlib import Path

from lab_utils.accelerators._cann import cann_version, pair_problem
from lab_utils.doctor._machine import Machine, Row
from lab_utils.doctor.checks.packages import installed

ORDER = 22


def check(machine: Machine) -> list[Row]:
    home = machine.environ.get("ASCEND_HOME_PATH")
    if not machine.has_npus and not home:
        return [Row("CANN", None, "none, and no NPUs")]
    if not home:
        advice = "source .../Ascend/cann/set_env.sh (CANN up to 8.5: ascend-toolkit/set_env.sh) before starting work."
        return [Row("CANN", False, "ASCEND_HOME_PATH is not set", advice)]
    if not Path(home).is_dir():
        return [
            Row(
                "CANN",
                False,
                f"{home} is no folder",
                "ASCEND_HOME_PATH points nowhere: source set_env.sh again.",
            )
        ]
    version = cann_version(machine.environ)
    if version is None:
        advice = "No version file is known there: see that ASCEND_HOME_PATH is CANN's own folder."
        return [Row("CANN", False, f"of an unknown release at {home}", advice)]
    torch_npu = installed("torch_npu")
    problem = pair_problem(version, torch_npu) if torch_npu else None
    if problem:
        return [
            Row(
                "CANN",
                False,
                f"{version} at {home}",
                f"{problem}: install one that matches (environment.yml).",
            )
        ]
    return [Row("CANN", True, f"{version} at {home}")]
