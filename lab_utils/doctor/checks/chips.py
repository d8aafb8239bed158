"""The chips that are visible, and their health."""

from __future__ import annotations

from lab_utils.doctor._machine import Machine, Row
from lab_utils.telemetry.chips import ChipReading

ORDER = 24
WELL = ("OK", "")


def check(machine: Machine) -> list[Row]:
    if machine.has_npus:
        return _npus(machine)
    if machine.has_gpus:
        return _gpus(machine)
    return [Row("chips", None, "none: a login node, or a machine that trains on its CPU")]


def _npus(machine: Machine) -> list[Row]:
    from lab_utils.telemetry.probes.npu import parse_table

    text = machine.ask("npu-smi", "info")
    if text is None:
        return [Row("chips", None, "npu-smi does not answer")]
    readings = parse_table(text)
    if not readings:
        advice = "npu-smi info printed no table that is understood: run it, and report its output."
        return [Row("chips", False, "none in npu-smi's table", advice)]
    ill = [r for r in readings if str(r.more.get("health") or "") not in WELL]
    found = f"{len(readings)} × {readings[0].name or 'NPU'}" + (
        f", {len(ill)} not well: {_named(ill)}" if ill else ""
    )
    if ill:
        advice = (
            "Keep this node out of jobs (Slurm: drain it); npu-smi info -t health -i N has codes to report."
        )
        return [Row("chips", False, found, advice)]
    return [Row("chips", True, found)]


def _named(readings: list[ChipReading]) -> str:
    return ", ".join(f"{r.index} {r.more.get('health')}" for r in readings[:8])


def _gpus(machine: Machine) -> list[Row]:
    text = machine.ask(
        "nvidia-smi", "--query-gpu=name,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"
    )
    rows = [[cell.strip() for cell in line.split(",")] for line in (text or "").splitlines() if line.strip()]
    if not rows:
        return [Row("chips", False, "nvidia-smi lists none", "Have the administrator look at the driver.")]
    ill = [str(i) for i, row in enumerate(rows) if row[-1].isdigit() and int(row[-1])]
    found = f"{len(rows)} × {rows[0][0]}" + (f", memory errors on {', '.join(ill)}" if ill else "")
    advice = "Keep this node out of jobs and report it." if ill else ""
    return [Row("chips", not ill, found, advice)]
