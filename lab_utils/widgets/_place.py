"""Whether somebody sits in front of this kernel."""

from __future__ import annotations

import os

# A Jupyter server tells its kernels which notebook they serve; VS Code leaves its own marks.
SEEN = ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD")


def headless() -> bool:
    """True where nobody can press a button: papermill, scripts, tests; ``ASCENT_HEADLESS`` = 1 or 0 wins."""
    said = os.environ.get("ASCENT_HEADLESS", "")
    if said in ("0", "1"):
        return said == "1"
    return not any(os.environ.get(name) for name in SEEN)
