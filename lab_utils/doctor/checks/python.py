"""The interpreter."""

from __future__ import annotations

import sys

from lab_utils.doctor._machine import Machine, Row

ORDER = 10
OLDEST = (3, 11)


def check(machine: Machine) -> list[Row]:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info < OLDEST:
        return [
            Row(
                "python",
                False,
                found,
                "Make the environment with Python 3.11 or newer: make PYTHON=python3.11.",
            )
        ]
    return [Row("python", True, found)]
