"""The notebook server and the kernel of this login node."""

from __future__ import annotations

import json
from pathlib import Path

from lab_utils.doctor._machine import Machine, Row
from lab_utils.doctor.checks.packages import installed as version_of

ORDER = 70


def check(machine: Machine) -> list[Row]:
    lab = version_of("jupyterlab")
    if lab is None:
        return [
            Row(
                "jupyter", None, "JupyterLab is not installed here", "make setup, where notebooks are opened."
            )
        ]
    return [Row("jupyter", True, f"JupyterLab {lab}"), _kernel(), _transport()]


def _kernel() -> Row:
    from lab_utils.panels.kernelspec import installed

    found = installed()
    advice = "lab kernelspec install (--user for your own servers)."
    if not found:
        return Row("notebook kernel", None, "ours is not installed; python3 works too", advice)
    broken = []
    for name, folder in found.items():
        argv = json.loads((folder / "kernel.json").read_text(encoding="utf-8"))["argv"]
        gone = [word for word in argv if word.startswith("/") and not Path(word).exists()]
        broken += [f"{name}: {gone[0]} is gone"] if gone else []
    if broken:
        return Row("notebook kernel", False, "; ".join(broken), advice)
    return Row("notebook kernel", True, ", ".join(f"{name} at {folder}" for name, folder in found.items()))


def _transport() -> Row:
    """How server and kernel talk: other users of a login node can listen to TCP, not to a socket of one's own."""
    from jupyter_core.paths import jupyter_config_path

    for folder in jupyter_config_path():
        for file in sorted(Path(folder).glob("jupyter*_config.json")):
            try:
                setting = json.loads(file.read_text(encoding="utf-8"))["KernelManager"]["transport"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if setting == "ipc":
                return Row("kernel transport", True, f"ipc, by {file}")
            advice = "Set it to ipc: TCP on a login node can be listened to by others."
            return Row("kernel transport", False, f"{setting}, by {file}", advice)
    advice = (
        "For servers of your own: --KernelManager.transport=ipc. Over TCP, others on this machine can listen."
    )
    return Row("kernel transport", None, "make lab takes ipc; other servers take TCP", advice)
