"""Debian's packages that some tests need: used where they are, installed where that is possible, else a reason to skip.

``ASCENT_TEST_INSTALL=0`` keeps tests from installing anything.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

INSTALL_SECONDS = 300


@cache
def installed(programs: tuple[str, ...], packages: tuple[str, ...]) -> dict[str, str]:
    """Paths of the programs; skips the test that asks where they can't be had."""
    paths = {program: _path(program) for program in programs}
    if not all(paths.values()):
        if os.environ.get("ASCENT_TEST_INSTALL", "1") == "0":
            pytest.skip(
                f"{', '.join(p for p, path in paths.items() if not path)} missing; ASCENT_TEST_INSTALL=0"
            )
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.skip(f"needs {' '.join(packages)} of Debian, and only root can install them here")
        _install(packages)
        paths = {program: _path(program) for program in programs}
        if not all(paths.values()):
            pytest.skip(f"apt-get install {' '.join(packages)} failed or timed out")
    return {program: path or "" for program, path in paths.items()}


def _path(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _install(packages: tuple[str, ...]) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    with (Path(tempfile.gettempdir()) / "ascent-tests-apt.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # apt-get refuses a second one; tests run in several processes
        for words in (install, ["apt-get", "update"], install):
            try:
                done = subprocess.run(words, env=environment, timeout=INSTALL_SECONDS, check=False, **quiet)
            except (OSError, subprocess.TimeoutExpired):
                return
            if words is install and done.returncode == 0:
                return
