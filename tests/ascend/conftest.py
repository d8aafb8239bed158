"""For tests of the Ascend path: the stand-in, built once a process; where it can't be, the reason to skip."""

import subprocess
import sys

import pytest
import system_packages

from lab_utils.ascend import stand_in, wheel


@pytest.fixture(scope="session")
def cann(tmp_path_factory):
    """Folder of the stand-in CANN; gcc comes by apt where it is missing and we may."""
    if wheel.location() is None:
        pytest.skip(f"no torch_npu {wheel.VERSION} in {wheel.folder()}: make setup")
    system_packages.installed(("gcc",), ("gcc", "libc6-dev"))
    place = tmp_path_factory.mktemp("cann")
    stand_in.build(place)
    return place


@pytest.fixture
def child(cann):
    """Runs a few lines of Python in a process that imports torch_npu with the stand-in; returns what it printed."""

    def run(code: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**stand_in.environment(cann), **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run
