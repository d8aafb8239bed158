"""The hub of models and data sets: offline unless somebody asks for it."""

from __future__ import annotations

from pathlib import Path

from lab_utils.doctor._machine import Machine, Row

ORDER = 51


def check(machine: Machine) -> list[Row]:
    setting = machine.environ.get("HF_HUB_OFFLINE", "")
    home = machine.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(home).expanduser()
    where = f"cache {cache}" + ("" if cache.is_dir() else " (not there yet)")
    if setting.lower() in ("1", "true", "yes", "on"):
        return [Row("hub", True, f"offline, {where}")]
    if setting:
        return [
            Row(
                "hub",
                True,
                f"online by HF_HUB_OFFLINE={setting}, {where}",
                "Jobs inherit it; 1 keeps them offline.",
            )
        ]
    return [Row("hub", True, f"jobs are offline; this shell is not (HF_HUB_OFFLINE is not set), {where}")]
