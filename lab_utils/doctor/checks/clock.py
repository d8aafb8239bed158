"""Clocks: a run is taken for lost by the age of its heartbeat, which another machine may have written."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

from lab_utils.doctor._machine import Machine, Row

ORDER = 43
ALLOWED = 5.0  # seconds; a heartbeat is old after 30


def check(machine: Machine) -> list[Row]:
    return [_skew(machine), _synchronised(machine)]


def _skew(machine: Machine) -> Row:
    """The file system's server stamps a file: its clock against ours, to the time that the writing took."""
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=machine.folder) as folder:
            file = Path(folder) / "now"
            before = time.time()
            file.write_text("x")
            stamped, after = file.stat().st_mtime, time.time()
    except OSError as error:
        return Row("clock", None, f"not compared: {error.strerror or error}")
    skew = stamped - after if stamped > after else min(stamped - before, 0.0)
    # File systems that count in whole seconds, or in ticks of the kernel, stamp a little early.
    if abs(skew) > ALLOWED:
        advice = "Runs may be taken for lost too early or too late: have both clocks set by one time server (chrony)."
        return Row("clock", False, f"{skew:+.1f} s between the file system's server and this machine", advice)
    return Row("clock", True, f"within {max(abs(skew), after - before):.1f} s of the file system's server")


def _synchronised(machine: Machine) -> Row:
    if text := machine.ask("chronyc", "-n", "tracking", seconds=5):
        offset = re.search(r"System time\s*:\s*([\d.]+) seconds", text)
        status = re.search(r"Leap status\s*:\s*(.+)", text)
        if status and "Not synchronised" in status[1]:
            return Row(
                "time server",
                False,
                "chrony is not synchronised",
                "Have the administrator look at chronyc sources.",
            )
        if offset:
            return Row("time server", True, f"chrony, off by {float(offset[1]):.4f} s")
    if text := machine.ask("timedatectl", "show", "-p", "NTPSynchronized", "--value", seconds=5):
        if text.strip() == "yes":
            return Row("time server", True, "synchronised")
        if text.strip() == "no":
            advice = "Several nodes need one clock: start chrony or systemd-timesyncd."
            return Row("time server", None, "not synchronised, says timedatectl", advice)
    return Row("time server", None, "neither chrony nor timedatectl answers")
