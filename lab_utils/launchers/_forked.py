"""Ranks of one short job on this machine: ``python -m lab_utils.launchers._forked RANKS MODULE|FILE.py ARGUMENTS …``.

As torchrun starts them, but forked from one process that has imported the engine: importing it takes each rank as
long as a small job does. For trials and benchmarks; a run has torchrun and a supervisor. Ends with the code of the
first rank that failed, whose place and signal are said on standard error, and leaves no rank behind.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import signal
import socket
import sys
import traceback

from lab_utils.launchers._rank import end_with_parent
from lab_utils.telemetry.chips import count

# torch imports its _dynamo at the first distributed launch.
SHARED = (
    "lab_utils.engine.engine",
    "lab_utils.engine.verify",
    "lab_utils.models.deepseek_v4.model",
    "torch._dynamo",
)


def command(ranks: int, target: str, *arguments: str) -> list[str]:
    """What to start for a module's name, or a file ending in ``.py``, on so many ranks.

    Where there are devices it is torchrun: a driver that importing has opened doesn't survive a fork.
    """
    if any(count(kind) for kind in ("npu", "cuda")):
        module = [] if target.endswith(".py") else ["-m"]
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return [sys.executable, "-m", *torchrun, *module, target, *arguments]
    return [sys.executable, "-m", __name__, str(ranks), target, *arguments]


def main(ranks: int, target: str, arguments: list[str]) -> int:
    for module in SHARED:
        importlib.import_module(module)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    alive = {}
    for rank in range(ranks):
        sys.stdout.flush()
        sys.stderr.flush()
        if (pid := os.fork()) == 0:
            end_with_parent()
            os.environ.update({k: str(v) for k, v in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()})
            _work(target, arguments)
        alive[pid] = rank
    signal.signal(signal.SIGTERM, lambda *_: _end(alive))
    return _wait(alive)


def _work(target: str, arguments: list[str]) -> None:
    """The rank's own program; never returns."""
    sys.argv = [target, *arguments]
    code = 0
    try:
        if target.endswith(".py"):
            sys.path.insert(0, os.path.dirname(target))
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(alive: dict[int, int]) -> int:
    """Until all have ended; the first that fails takes the others along."""
    first = 0
    while alive:
        pid, status = os.wait()
        rank, code = alive.pop(pid, None), os.waitstatus_to_exitcode(status)
        if rank is None or code == 0 or first:
            continue
        how = (
            f"was ended by Signal {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        print(f"Error: rank {rank} {how}", file=sys.stderr, flush=True)
        first = code if code > 0 else 1
        _end(alive)
    return first


def _end(alive: dict[int, int]) -> None:
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
