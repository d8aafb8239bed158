"""Processes that hold a chip: the next job on this node would fail with EJ0001, or out of memory."""

from __future__ import annotations

import re

from lab_utils.doctor._machine import Machine, Row

ORDER = 25
_NONE = re.compile(r"No running processes found in NPU")


def npu_processes(text: str) -> list[tuple[int, str, str]]:
    """Process id, name and chip (``NPU:chip``) of each line of the second table of ``npu-smi info``."""
    found = []
    for line in text.splitlines():
        if not line.lstrip().startswith("|") or _NONE.search(line):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        # NPU and chip, process id, name, memory; newer drivers add the id inside a container.
        if len(cells) in (4, 5) and cells[1].isdigit() and len(cells[0].split()) == 2:
            found.append((int(cells[1]), cells[2], ":".join(cells[0].split())))
    return found


def check(machine: Machine) -> list[Row]:
    if machine.has_npus:
        text = machine.ask("npu-smi", "info")
        if text is None:
            return [Row("chips in use", None, "npu-smi does not answer")]
        found = npu_processes(text)
    elif machine.has_gpus:
        text = machine.ask(
            "nvidia-smi", "--query-compute-apps=pid,process_name,gpu_bus_id", "--format=csv,noheader"
        )
        if text is None:
            return [Row("chips in use", None, "nvidia-smi does not answer")]
        cells = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
        found = [(int(c[0]), c[1], c[-1]) for c in cells if c[0].isdigit()]
    else:
        return [Row("chips in use", None, "no chips on this machine")]
    if not found:
        return [Row("chips in use", True, "no process holds a chip")]
    shown = ", ".join(f"{name} ({pid}) on {chip}" for pid, name, chip in found[:4])
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    advice = "A job is running, or a dead one left it: wait 10 s, look again, then end the process."
    return [Row("chips in use", False, f"{shown}{more}", advice)]
