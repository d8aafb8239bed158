"""What watching a very large run costs: the live view in a real kernel, over the files of a run that is played.

The run is a stand-in (``_played.py``): a process beside the kernel writes the files of 128 nodes of 16 chips, at the
rate at which they would. The kernel is a real one; somebody reads all that it sends, as a browser would.
"""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab_utils.bench import _played
from lab_utils.runs.api import Run

WARM = 10.0  # seconds after catching up before anything is measured
_SHOW = """
from lab_utils import LiveView, attach
view = LiveView(attach({path!r}))
display(view)
"""
_ASK = "s = view.board.handle.spent; print((s.calls, list(s.recent), view.board.follower.series.newest))"


def bench_live(
    minutes: float = 10.0,
    *,
    nodes: int = 128,
    chips: int = 16,
    steps: int = 10_000,
    step_seconds: float = 3.0,
    chip_seconds: float = 2.0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Processor, memory and time of each update of a kernel that shows a live view, over ``minutes``.

    Args:
        nodes, chips: size of the run: ``chips`` on each of ``nodes``.
        steps: logged before the view is opened.
        step_seconds, chip_seconds: between lines of metrics, and between samples of a node.
    """
    with tempfile.TemporaryDirectory(prefix="ascent-live-") as folder:
        run = _played.prepare(Path(folder), nodes=nodes, chips=chips, steps=steps)
        sizes = {"nodes": nodes, "chips": chips, "step_seconds": step_seconds, "chip_seconds": chip_seconds}
        words = [f"{key}={value}" for key, value in {"seconds": 60 * minutes + 600, **sizes}.items()]
        writer = subprocess.Popen([sys.executable, "-m", _played.__name__, str(run.path), *words])
        kernel = _Kernel()
        try:
            say(f"{nodes * chips:,} chips played into {run.path}; the view is opened after {steps:,} steps")
            found = _measure(kernel, Run(run), 60 * minutes)
        finally:
            kernel.close()
            writer.kill()
            writer.wait()
    return {**sizes, "steps_before": steps, "minutes": minutes, **found}


def _measure(kernel: _Kernel, run: Run, seconds: float) -> dict[str, Any]:
    import psutil

    process = psutil.Process(kernel.pid)
    began = time.monotonic()
    kernel.execute(_SHOW.format(path=str(run.path)))
    opened = time.monotonic() - began
    # A view that opens fast is up to date before its first update has ended: there is nothing of it to report yet.
    while kernel.newest() < int(run.directory.status["step"]) - 3 or not kernel.calls():
        time.sleep(0.2)
    caught_up = time.monotonic() - began
    first = kernel.spent()
    time.sleep(WARM)
    before, sent, calls = process.cpu_times(), kernel.sent, kernel.calls()
    began, memory = time.monotonic(), []
    while (elapsed := time.monotonic() - began) < seconds:
        memory.append((elapsed, process.memory_info().rss / 2**20))
        time.sleep(1.0)
    # A short look at a busy machine may end before an update does; then it goes on until two have ended.
    while kernel.calls() < calls + 2:
        time.sleep(0.2)
    after, elapsed = process.cpu_times(), time.monotonic() - began
    sent = [b - a for a, b in zip(sent, kernel.sent)]
    calls = kernel.calls() - calls
    updates = kernel.spent()[-calls:]  # of many, the newest that a view remembers
    wall = sorted(1e3 * w for w, _ in updates)
    settled = [(at, mib) for at, mib in memory if at > 0.2 * seconds] or memory
    slope = statistics.linear_regression(*zip(*settled)).slope if len(settled) > 2 else 0.0
    return {
        "open_s": round(opened, 2),
        "caught_up_s": round(caught_up, 2),
        "longest_while_catching_up_ms": round(1e3 * max(w for w, _ in first), 1),
        "cpu_percent": round(100 * (after.user + after.system - before.user - before.system) / elapsed, 2),
        "rss_mib": [round(settled[0][1], 1), round(settled[-1][1], 1)],
        "growth_mib_a_minute": round(60 * slope, 3),
        "updates": calls,
        "update_ms": {
            "mean": round(statistics.fmean(wall), 1),
            "p99": round(wall[int(0.99 * (len(wall) - 1))], 1),
            "longest": round(wall[-1], 1),
            "longest_of_processor": round(1e3 * max(c for _, c in updates), 1),
        },
        "messages_a_s": round(sent[0] / elapsed, 2),
        "kib_a_s": round(sent[1] / 2**10 / elapsed, 1),
    }


class _Kernel:
    """A Jupyter kernel, and somebody who reads what it sends, as a browser would."""

    def __init__(self) -> None:
        from jupyter_client.manager import KernelManager

        self._manager = KernelManager(kernel_name="python3", transport="ipc")
        self._manager.start_kernel(env={**os.environ, "ASCENT_HEADLESS": "0"})
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=120)
        self.pid = self._manager.provisioner.process.pid
        self.sent = (0, 0)  # messages, bytes
        self._idle: dict[str, threading.Event] = {}
        self._said: dict[str, str] = {}
        self._open = True
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def execute(self, code: str) -> str:
        """Run code; what it printed.

        Raises:
            RuntimeError: it raised.
        """
        number = self._client.execute(code)
        self._idle.setdefault(number, threading.Event()).wait()
        said = self._said.pop(number, "")
        if said.startswith("error"):
            raise RuntimeError(said)
        return said

    def calls(self) -> int:
        return self._ask()[0]

    def spent(self) -> list[tuple[float, float]]:
        return self._ask()[1]

    def newest(self) -> int:
        return self._ask()[2]

    def _ask(self) -> tuple[int, list[tuple[float, float]], int]:
        return ast.literal_eval(self.execute(_ASK))

    def _read(self) -> None:
        from queue import Empty

        while self._open:
            try:
                message = self._client.get_iopub_msg(timeout=0.5)
            except Empty:
                continue
            parent = message["parent_header"].get("msg_id", "")
            content = message["content"]
            if message["msg_type"].startswith("comm"):
                size = len(str(content)) + sum(len(buffer) for buffer in message["buffers"])
                self.sent = (self.sent[0] + 1, self.sent[1] + size)
            elif message["msg_type"] == "stream":
                self._said[parent] = self._said.get(parent, "") + content["text"]
            elif message["msg_type"] == "error":
                self._said[parent] = f"error {content['ename']}: {content['evalue']}"
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                self._idle.setdefault(parent, threading.Event()).set()

    def close(self) -> None:
        self._open = False
        self._reader.join()
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
