"""``lab ascend selftest``: on real chips, what the check can't prove. One report, for people and for programs.

Each part runs in processes of its own, so that one which dies, or hangs, leaves the others. With ``--device cpu`` the
same parts run on this machine's cores and gloo: that shows that the test works, and says nothing of a chip. Nothing
here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab_utils.ascend.report import Part, Report, machine, write
from lab_utils.errors import LabError

WORKERS = "lab_utils.ascend.workers"
OPERATORS_S, STEPS_S, SWEEP_S, SLACK_S = 1800.0, 900.0, 900.0, 600.0  # until a part counts as hanging
# Largest relative difference of a loss, a gradient norm and a parameter's norm after two steps in fp32; matrix products
# of an NPU sum in another order than a CPU's.
TOLERANCE = {"losses": 1e-4, "norms": 1e-3, "weights": 1e-3}
SIZES = {"cpu": [2**12, 2**16, 2**20, 2**22]}  # bytes
CHIP_SIZES = [2**12, 2**16, 2**20, 2**24, 2**26, 2**28]


def run(
    device: str,
    *,
    minutes: float = 10.0,
    nproc: int | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Every part, and the report on disk.

    Args:
        device: a kind of device; ``cpu`` to try the test itself.
        minutes: of the burn-in; 0 leaves it out.
        nproc: ranks; None: every device of the node, on a CPU two.
        out: the report's file; its numbers go beside it as ``.json``.

    Raises:
        LayoutError: no such kind of device, or none on this machine.
        RunError: the report can't be written.
    """
    from lab_utils.telemetry.chips import count

    _there(device)
    ranks = nproc or (2 if device == "cpu" else count(device))
    report = Report(machine(device, ranks))
    report.path = out or Path(f"ascend-selftest-{socket.gethostname()}-{time.strftime('%Y%m%d-%H%M%S')}.md")
    parts: list[tuple[str, Callable[[Path], tuple[bool, str, Any]]]] = [
        ("operators", lambda folder: operators(device, folder)),
        ("two steps", lambda folder: two_steps(device, folder)),
        ("collectives", lambda folder: collectives(device, ranks, folder)),
    ]
    if minutes:
        parts.append(("burn-in", lambda folder: burn_in(device, ranks, minutes, folder)))
    for name, part in parts:
        say(f"{name} …")
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="ascent-selftest-") as folder:
            try:
                ok, found, rows = part(Path(folder))
            except LabError as error:
                ok, found, rows = False, str(error), None
        report.parts.append(Part(name, ok, found, time.perf_counter() - began, rows))
        say(f"{name}: {'passed' if ok else 'FAILED'}, {found}")
        write(report)  # what is known so far survives whatever the next part does
    return report


# -- parts: whether it passed, a sentence, numbers -------------------------------------------------------------------


def operators(device: str, folder: Path) -> tuple[bool, str, Any]:
    """Every implementation that runs on the device beside its definition, values and gradients."""
    words = [
        sys.executable,
        "-m",
        "lab_utils.cli",
        "kernels",
        "check",
        "--device",
        device,
        "--seeds",
        "1",
        "--json",
    ]
    done = _ended(words, OPERATORS_S)
    try:
        rows = json.loads(done.stdout)
    except ValueError:
        return False, _end_of(done), None
    wrong = [f"{row['operator']}/{row['implementation']} in {row['dtype']}" for row in rows if not row["ok"]]
    own = sum(row["implementation"] == device for row in rows)
    found = f"{len(rows)} comparisons, {own} of {device}'s own implementations"
    return bool(rows) and not wrong, f"wrong: {', '.join(wrong[:4])}" if wrong else found, rows


def two_steps(device: str, folder: Path) -> tuple[bool, str, Any]:
    """The same two steps on the device and on the CPU."""
    found = {}
    for name, kind in (("there", device), ("here", "cpu")):
        (folder / name).mkdir()
        options = {"device": kind, "folder": str(folder / name / "run")}
        answer, why = _worker("two_steps", 1, options, folder / name, STEPS_S)
        if answer is None:
            return False, f"on {kind}: {why}", None
        found[name] = answer
    differences = {name: _largest(found["there"][name], found["here"][name]) for name in TOLERANCE}
    ok = all(differences[name] <= TOLERANCE[name] for name in TOLERANCE)
    words = ", ".join(
        f"{name} differ by {differences[name]:.1e} (allowed {TOLERANCE[name]:g})" for name in TOLERANCE
    )
    return ok, words, {"differences": differences, **found}


def collectives(device: str, ranks: int, folder: Path) -> tuple[bool, str, Any]:
    """All-reduce, all-gather and all-to-all by size."""
    if ranks < 2:
        return True, "left out: one device", None
    options = {"device": device, "bytes": SIZES.get(device, CHIP_SIZES)}
    rows, why = _worker("sweep", ranks, options, folder, SWEEP_S)
    if rows is None:
        return False, why, None
    wrong = [f"{row['collective']} of {row['bytes']:,} bytes" for row in rows if not row["right"]]
    best = {
        name: max(r["gb_s"] for r in rows if r["collective"] == name)
        for name in dict.fromkeys(r["collective"] for r in rows)
    }
    found = ", ".join(f"{name} {rate:.2f} GB/s" for name, rate in best.items())
    return not wrong, f"wrong values: {', '.join(wrong[:3])}" if wrong else f"{ranks} ranks: {found}", rows


def burn_in(device: str, ranks: int, minutes: float, folder: Path) -> tuple[bool, str, Any]:
    """Training for a while: the loss falls, nothing gets too hot, no chip says it is ill."""
    from lab_utils.telemetry.alerts import HOT

    options = {"device": device, "seconds": minutes * 60, "folder": str(folder / "run")}
    row, why = _worker("burn_in", ranks, options, folder, minutes * 60 + SLACK_S)
    if row is None:
        return False, why, None
    chips, hot = row["chips"], HOT.get(device)
    wrong = []
    if not row["finite"]:
        wrong.append("a loss or gradient was not finite")
    if not row["last"] < row["first"]:
        wrong.append(f"the loss did not fall: {row['first']:.3f} to {row['last']:.3f}")
    if hot and chips.get("chip/temp_max", 0.0) > hot:
        wrong.append(f"a chip reached {chips['chip/temp_max']:.0f} °C (limit {hot:.0f})")
    if chips.get("chip/unhealthy"):
        wrong.append(f"{chips['chip/unhealthy']:.0f} chips said they are not well")
    told = {"chip/util_mean": "{:.0f} % used", "chip/temp_max": "{:.0f} °C", "chip/power_total": "{:.0f} W"}
    seen = ", ".join(form.format(chips[key]) for key, form in told.items() if key in chips)
    found = (
        f"{row['steps']} steps in {row['seconds']:.0f} s, loss {row['first']:.3f} to {row['last']:.3f}, "
        f"{row['tokens_per_s']:,.0f} tokens/s" + (f"; at most {seen}" if seen else "; the chips say nothing")
    )
    return not wrong, "; ".join(wrong) if wrong else found, row


# -- helpers ---------------------------------------------------------------------------------------------------------


def _there(device: str) -> None:
    from lab_utils.accelerators import accelerator_class
    from lab_utils.errors import LayoutError

    if not accelerator_class(device).available():
        raise LayoutError(
            f"--device {device}: this machine has no {device} device; run it on a node that has, or try the test "
            "itself by --device cpu."
        )


def _worker(name: str, ranks: int, options: dict[str, Any], folder: Path, seconds: float) -> tuple[Any, str]:
    """What a worker leaves, or None and why."""
    from lab_utils.launchers._forked import command

    out = folder / "result.json"
    file = folder / "options.json"
    file.write_text(json.dumps({**options, "out": str(out)}))
    target = f"{WORKERS}.{name}"
    words = [sys.executable, "-m", target, str(file)] if ranks == 1 else command(ranks, target, str(file))
    done = _ended(words, seconds)
    if not out.exists():
        return None, _end_of(done)
    return json.loads(out.read_text()), ""


def _ended(words: list[str], seconds: float) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    with subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its ranks too
            output, errors = process.communicate()
            errors += f"\nno answer in {seconds:.0f} s"
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def _end_of(done: subprocess.CompletedProcess) -> str:
    kept = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in kept if "Error" in line or "error:" in line]
    return f"ended with code {done.returncode}: {(errors or kept or ['no message'])[-1][:300]}"


def _largest(found: Any, expected: Any) -> float:
    """Largest relative difference of two lists or dicts of numbers; infinite where they don't match."""
    if isinstance(found, dict):
        if found.keys() != expected.keys():
            return math.inf
        found, expected = list(found.values()), [expected[key] for key in found]
    pairs = list(zip(found, expected, strict=True))
    if not all(math.isfinite(x) for pair in pairs for x in pair):
        return math.inf
    scale = max((abs(b) for _, b in pairs), default=0.0)
    return max((abs(a - b) / max(abs(b), 1e-3 * scale, 1e-12) for a, b in pairs), default=0.0)
