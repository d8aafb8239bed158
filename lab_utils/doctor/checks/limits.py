"""Limits of this session: open files, locked memory, shared memory."""

from __future__ import annotations

import os
import resource

from lab_utils.doctor._machine import Machine, Row

ORDER = 61
FILES = 4096
TIGHT = 1024  # fewer, and even a notebook with its widgets and logs runs out
SHM = 2**30


def check(machine: Machine) -> list[Row]:
    return [_files(), _locked(machine), _shm(machine)]


def _shown(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _files() -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_shown(soft)}, may be raised to {_shown(hard)}"
    if soft != resource.RLIM_INFINITY and soft < FILES:
        able = hard == resource.RLIM_INFINITY or hard >= FILES
        how = f"ulimit -n {FILES} before work" if able else f"ask for nofile {FILES} in limits.conf"
        advice = f"A job of many ranks opens a connection to each: {how}."
        return Row("open files", False if soft < TIGHT else None, found, advice)
    return Row("open files", True, found)


def _locked(machine: Machine) -> Row:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:,.1f} MiB"
    if not (machine.has_npus or machine.has_gpus):
        return Row("locked memory", None, f"{shown}; matters on compute nodes alone")
    if soft != resource.RLIM_INFINITY:
        advice = (
            "RDMA needs memlock unlimited: /etc/security/limits.conf, PropagateResourceLimitsExcept in Slurm."
        )
        return Row("locked memory", False, shown, advice)
    return Row("locked memory", True, shown)


def _shm(machine: Machine) -> Row:
    folder = machine.system / "dev" / "shm"
    try:
        stats = os.statvfs(folder)
    except OSError:
        return Row("shared memory", None, f"no {folder}")
    size, free = stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize
    found = f"{free / 2**30:,.1f} of {size / 2**30:,.1f} GiB free at {folder}"
    if size < SHM:
        return Row(
            "shared memory",
            False,
            found,
            "In a container give it more: --shm-size=16g, or an emptyDir of medium Memory.",
        )
    return Row("shared memory", True, found)
