"""The browser of the tests."""

from __future__ import annotations

from lab_utils.doctor._machine import Machine, Row

ORDER = 80
NAMES = ("chromium", "chromium-browser", "google-chrome")


def check(machine: Machine) -> list[Row]:
    found = next((path for name in NAMES if (path := machine.which(name))), None)
    if found is None:
        return [Row("chromium", None, "not here: tests in a browser are skipped")]
    return [Row("chromium", True, found)]
