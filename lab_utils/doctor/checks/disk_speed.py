"""How fast the folder of runs takes a checkpoint: one stream, forced to the disk."""

from __future__ import annotations

import os
import tempfile
import time

from lab_utils.doctor._machine import Machine, Row

ORDER = 41
MIB = 2**20
SIZE = 64 * MIB
SLOW = 100e6  # bytes/s: a GiB of weights takes ten seconds


def check(machine: Machine) -> list[Row]:
    if machine.quick:
        return [Row("disk speed", None, "not measured (--quick)")]
    block = os.urandom(4 * MIB)  # what compresses well would flatter the file system
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=machine.folder) as file:
            began = time.perf_counter()
            for _ in range(SIZE // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = SIZE / (time.perf_counter() - began)
    except OSError as error:
        return [Row("disk speed", None, f"not measured: {error.strerror or error}")]
    found = f"{rate / 1e6:,.0f} MB/s, writing {SIZE // MIB} MiB and forcing it to the disk"
    if rate < SLOW:
        advice = "Checkpoints will be slow: point ASCENT_RUNS to a faster disk, or raise schedule.save_every."
        return [Row("disk speed", False, found, advice)]
    return [Row("disk speed", True, found)]
