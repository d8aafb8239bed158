"""A run goes on with the same losses under another layout than it was saved under."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from lab_utils.launchers._forked import command

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_saved_under_each_layout_resumed_under_each(tmp_path: Path) -> None:
    done = subprocess.run(
        command(4, str(HERE / "resume_matrix.py"), str(tmp_path)),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert len(found) == 4 * 4 + 4 * 2
    assert max(found.values()) < 1e-5, found
