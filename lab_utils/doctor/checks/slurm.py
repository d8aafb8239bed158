"""Slurm: whether jobs can be given to it from here, and its partitions."""

from __future__ import annotations

from lab_utils.doctor._machine import Machine, Row

ORDER = 71


def check(machine: Machine) -> list[Row]:
    if machine.which("sinfo") is None:
        return [Row("slurm", None, "not here: cluster.launcher=slurm cannot be used from this machine")]
    if not machine.has_slurm:
        advice = "To use it, put the cluster's slurm.conf into /etc/slurm, or name it in SLURM_CONF."
        return [Row("slurm", None, "its tools are here, but no slurm.conf", advice)]
    missing = [tool for tool in ("sbatch", "squeue", "scontrol", "scancel") if machine.which(tool) is None]
    if missing:
        return [
            Row("slurm", False, f"without {', '.join(missing)}", "Install Slurm's client tools, or set PATH.")
        ]
    text = machine.ask("sinfo", "-h", "-o", "%P|%a|%D|%l|%G")
    if text is None:
        advice = "sinfo fails or hangs: is slurmctld up, munge running, and slurm.conf this cluster's?"
        return [Row("slurm", False, "the controller does not answer", advice)]
    partitions = [line.split("|") for line in text.splitlines() if line.count("|") >= 4]
    up = [p for p in partitions if p[1] == "up"]
    shown = "; ".join(f"{p[0]} {p[2]} nodes, {p[3]}, {p[4]}" for p in up[:6])
    if not up:
        return [
            Row(
                "slurm",
                False,
                "no partition is up",
                "Ask the administrator; scontrol show partition has the reason.",
            )
        ]
    return [Row("slurm", True, f"{len(up)} partition{'s' * (len(up) != 1)} up: {shown}")]
