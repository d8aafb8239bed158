"""The process of one node of a scheduler's job: ``python -m lab_utils.launchers._node RUN_PATH -- TORCHRUN …``.

It starts torchrun and stands between it and the scheduler's signals: a SIGTERM (preemption, eviction) or SIGUSR1
becomes a request to all ranks to save and stop, and torchrun never sees it: torchrun would kill its ranks after 30 s,
and a checkpoint of a large model takes longer. Where Slurm gave the job only some NPUs of the node, it says which.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab_utils.ascend.environment import problems
from lab_utils.launchers._scheduled import ask_to_yield, ended
from lab_utils.runs.directory import RunDirectory

_GRES = re.compile(r"\bNodes=(\S+).*\bGRES=\S*\bnpu\S*\(IDX:([\d,-]+)\)")
DEVICES = Path("/dev")


def numbers(text: str) -> list[int]:
    """``0-3,6`` as a list."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def visible_npus() -> str | None:
    """NPUs that Slurm gave this job on this node, as ``ASCEND_RT_VISIBLE_DEVICES``; None for all, or where unknown.

    Slurm sets no variable for a generic resource, but with ``File=`` in its gres.conf it knows the numbers.
    """
    job, node = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURMD_NODENAME")
    total = len([path for path in DEVICES.glob("davinci*") if path.name.removeprefix("davinci").isdigit()])
    if not job or not node or not total or os.environ.get("ASCEND_RT_VISIBLE_DEVICES"):
        return None
    try:
        text = _ask("scontrol", "show", "job", "-d", job)
        for nodes, indices in _GRES.findall(text):
            if node in _ask("scontrol", "show", "hostnames", nodes).split():
                given = numbers(indices)
                return ",".join(map(str, given)) if len(given) < total else None
    except (OSError, subprocess.SubprocessError):
        pass  # all are visible then, as without this
    return None


def _ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout


def main(arguments: list[str]) -> int:
    run_dir, command = RunDirectory(arguments[0]), arguments[arguments.index("--") + 1 :]
    if (code := ended(run_dir)) is not None:
        return code
    heard: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: heard.append(number))
    environment = dict(os.environ)
    if npus := visible_npus():
        environment["ASCEND_RT_VISIBLE_DEVICES"] = npus
    print(f"--- {os.uname().nodename}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
    if any(DEVICES.glob("davinci[0-9]*")):
        for problem in problems(environment):
            print(f"warning: {problem.found}: {problem.advice}", flush=True)
    # Ignored signals stay ignored in torchrun (which is told not to handle SIGTERM); the ranks listen to both.
    shielded = ["bash", "-c", "trap '' TERM USR1; exec \"$@\"", "node", *command]
    with subprocess.Popen(shielded, env=environment, stdin=subprocess.DEVNULL) as torchrun:
        while True:
            if heard:
                heard.clear()
                print("the scheduler asks for this node: saving a checkpoint", flush=True)
                ask_to_yield(run_dir)
            try:
                return torchrun.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
