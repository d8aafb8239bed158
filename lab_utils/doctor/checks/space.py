"""Room for runs."""

from __future__ import annotations

import os

from lab_utils.doctor._machine import Machine, Row

ORDER = 42
GIB = 2**30
LEAST, FILES = 10 * GIB, 10_000


def check(machine: Machine) -> list[Row]:
    stats = os.statvfs(machine.folder)
    free, total = stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize
    found = f"{free / GIB:,.1f} of {total / GIB:,.1f} GiB free at {machine.folder}"
    if free < LEAST:
        advice = "Remove old runs or their checkpoints (lab runs list), or point ASCENT_RUNS to a larger file system."
        return [Row("free space", False, found, advice)]
    if stats.f_files and stats.f_favail < FILES:
        advice = "The file system has room but few files are left to make: remove old runs."
        return [Row("free space", False, f"{found}, {stats.f_favail:,} files left", advice)]
    return [Row("free space", True, found)]
