"""One rank's process: its own log file, then the worker. ``python -m lab_utils.launchers._rank RUN_PATH``.

Output goes to ``logs/rank-<N>.log``, that of native libraries included. An exception that the worker doesn't
handle leaves one sentence with its time in ``logs/rank-<N>.error.json``, so that the supervisor can name the
first rank that failed. ``ASCENT_WORKER_MODULE`` puts another module in the worker's place, for tests.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from lab_utils.accelerators._hidden import show_devices

WORKER = "lab_utils.engine.worker"
PR_SET_PDEATHSIG = 1


def redirect(path: Path) -> None:
    """Send this process's output and errors, those of native libraries too, to the end of ``path``."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when torchrun dies: no rank is left alone with its device (Linux)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("torchrun died before this rank could start")


def sentence(error: BaseException, rank: str) -> str:
    """An exception as one sentence; errors written for the user stand as they are."""
    from lab_utils.errors import LabError

    if isinstance(error, LabError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    here = next((f for f in reversed(frames) if "site-packages" not in f.filename and f.lineno), None)
    where = f" at {Path(here.filename).name}:{here.lineno}" if here else ""
    message = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
    return f"Rank {rank}: {type(error).__name__}{where}: {message} (logs/rank-{rank}.log has the traceback)."


def main() -> None:
    path = Path(sys.argv[1])
    rank = os.environ.get("RANK", "0")
    logs = path / "logs"
    logs.mkdir(exist_ok=True)
    redirect(logs / f"rank-{rank}.log")
    faulthandler.enable()
    end_with_parent()
    report = logs / f"rank-{rank}.error.json"
    report.unlink(missing_ok=True)
    host, now = socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"--- rank {rank}, process {os.getpid()} on {host}, {now}", flush=True)
    show_devices()
    worker = os.environ.get("ASCENT_WORKER_MODULE", WORKER)
    sys.argv = [worker, str(path)]
    try:
        runpy.run_module(worker, run_name="__main__", alter_sys=True)
    except SystemExit:
        raise
    except BaseException as error:
        text = sentence(error, rank)
        traceback.print_exc()
        print(f"error: {text}", file=sys.stderr, flush=True)
        report.write_text(json.dumps({"rank": int(rank), "time": time.time(), "error": text}))
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
