"""The report of ``lab ascend selftest``: a page for people, its numbers beside it. Nothing here imports torch."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lab_utils.errors import RunError


@dataclass(frozen=True)
class Part:
    """One part: whether it passed, a sentence, its numbers."""

    name: str
    ok: bool
    found: str
    seconds: float
    rows: Any = None


@dataclass
class Report:
    """All of it."""

    machine: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    path: Path | None = None

    @property
    def ok(self) -> bool:
        return all(part.ok for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        parts = [asdict(part) for part in self.parts]
        return {"ok": self.ok, "machine": self.machine, "parts": parts, "report": str(self.path)}

    def markdown(self) -> str:
        """The page that is sent."""
        out = [f"# lab ascend selftest: {'passed' if self.ok else 'FAILED'}", ""]
        out += [f"- {key}: {value}" for key, value in self.machine.items() if value not in (None, "", {})]
        out += ["", "| part | | found | s |", "|---|---|---|---|"]
        out += [
            f"| {p.name} | {'pass' if p.ok else 'FAIL'} | {p.found} | {p.seconds:.0f} |" for p in self.parts
        ]
        for part in self.parts:
            if part.name == "collectives" and part.rows:
                out += [
                    "",
                    "## Collectives",
                    "",
                    "| | bytes | ms | GB/s of the bus | right |",
                    "|---|---|---|---|---|",
                ]
                out += [
                    f"| {r['collective']} | {r['bytes']:,} | {r['ms']:.3f} | {r['gb_s']:.2f} | "
                    f"{'yes' if r['right'] else 'NO'} |"
                    for r in part.rows
                ]
            if part.name == "operators" and part.rows:
                out += [
                    "",
                    "## Operators",
                    "",
                    "| | dtype | forward | gradient | ok |",
                    "|---|---|---|---|---|",
                ]
                out += [
                    f"| {r['operator']}/{r['implementation']} | {r['dtype']} | {_error(r['forward_error'])} | "
                    f"{_error(r['gradient_error'])} | {'yes' if r['ok'] else 'NO'} |"
                    for r in part.rows
                ]
        return "\n".join(out) + "\n"


def write(report: Report) -> None:
    """The page, and its numbers beside it."""
    assert report.path is not None
    try:
        report.path.parent.mkdir(parents=True, exist_ok=True)
        report.path.write_text(report.markdown(), encoding="utf-8")
        report.path.with_suffix(".json").write_text(json.dumps(report.as_dict(), indent=1), encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{report.path} cannot be written ({error.strerror}): give another by --out."
        ) from None


def machine(device: str, ranks: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from lab_utils.accelerators._cann import cann_version, driver_version
    from lab_utils.telemetry.chips import count

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    kept = ("HCCL_", "ASCEND_", "PYTORCH_NPU", "TASK_QUEUE", "CPU_AFFINITY", "TORCH_NPU_", "TORCH_HCCL_")
    return {
        "host": socket.gethostname(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": device,
        "ranks": ranks,
        "devices here": count(device),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        "torch": installed("torch"),
        "torch_npu": installed("torch_npu"),
        "ascent-lab": installed("ascent-lab"),
        "CANN": cann_version(),
        "driver": driver_version(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(kept)},
    }


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
