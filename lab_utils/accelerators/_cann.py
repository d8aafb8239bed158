"""Versions of Ascend's software on this machine, from files: neither torch nor the driver is touched."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

DRIVER = "usr/local/Ascend/driver/version.info"
# Where releases of CANN keep their version, below ASCEND_HOME_PATH; the first that names one counts.
FILES = (
    "version.cfg",
    "version.info",
    "*-linux/ascend_toolkit_install.info",
    "compiler/version.info",
    "runtime/version.info",
)
# CANN's release -> releases of torch_npu made for it (ecosystem table of Ascend/pytorch, August 2026).
PAIRS: dict[str, tuple[str, ...]] = {
    "9.1.0": ("2.12.0", "2.11.0", "2.10.0", "2.9.0", "2.7.1"),
    "9.0.0": ("2.10.0", "2.9.0", "2.8.0", "2.7.1"),
    "8.5.0": ("2.9.0", "2.8.0", "2.7.1", "2.6.0"),
    "8.3.RC1": ("2.8.0", "2.7.1", "2.6.0"),
    "8.2.RC1": ("2.6.0", "2.5.1"),
}
_RELEASE = re.compile(r"\d+\.\d+\.(?:\d+|RC\d+)(?:[.\w-]*)", re.IGNORECASE)
_LINE = re.compile(r"^\s*(?:version|[\w]*running_version|[Vv]ersion_dir)\s*[=:]\s*(.+)$", re.IGNORECASE)


def cann_version(environ: Mapping[str, str] = os.environ) -> str | None:
    """Release of the CANN that ``ASCEND_HOME_PATH`` names, as ``9.1.0``; None where there is none or it doesn't say."""
    home = environ.get("ASCEND_HOME_PATH")
    if not home:
        return None
    for pattern in FILES:
        for file in sorted(Path(home).glob(pattern)):
            if found := _release(file):
                return found
    return None


def driver_version(system: Path = Path("/")) -> str | None:
    """Release of the NPU driver; None without one."""
    return _release(system / DRIVER)


def pair_problem(cann: str, torch_npu: str) -> str | None:
    """Why two releases don't belong together; None where they do, or where nothing is known of this CANN."""
    base = torch_npu.split("+")[0].split(".post")[0]
    known = next((PAIRS[release] for release in PAIRS if cann.startswith(release)), None)
    if known is None or base in known:
        return None
    return f"CANN {cann} is made for torch_npu {' or '.join(known)}, not {torch_npu}"


def _release(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        # [7.3.0.1.231:8.0.RC2]: internal number, then the release that people know.
        if (match := _LINE.match(line)) and (releases := _RELEASE.findall(match[1].rpartition(":")[2])):
            return releases[0]
    return None
