"""This machine: torchrun under a supervisor, in a session of its own.

The supervisor is a process apart, so a run outlives the notebook's kernel, the terminal and whoever launched
it. It keeps the heartbeat, passes signals on, and writes how the run ended.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from lab_utils.ascend import environment as ascend
from lab_utils.errors import LayoutError, RunError
from lab_utils.launchers._base import SCRIPT, JobInfo, exports, options_of, read_logs
from lab_utils.recipe import Recipe
from lab_utils.runs.checks import device_kind
from lab_utils.runs.directory import RunDirectory, write_atomic
from lab_utils.runs.states import ACTIVE, JobState
from lab_utils.telemetry.wandb import environment as wandb_environment

SUPERVISOR = "lab_utils.launchers._supervisor"
RANK = "lab_utils.launchers._rank"
# Kept so that a finished supervisor is reaped by this process, where it is still there.
_started: list[subprocess.Popen] = []


def environment(run_dir: RunDirectory, recipe: Recipe) -> tuple[dict[str, str], dict[str, str]]:
    """Variables of the ranks: those that are set, and those that yield to what the user has set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = recipe.cluster.threads or max(1, cores // recipe.cluster.nproc)
    firm = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **wandb_environment(run_dir.path, recipe.tracking),
    }
    for passed_on in ("ASCENT_WORKER_MODULE", "ASCENT_ACCELERATOR", "PYTHONPATH"):
        if os.environ.get(passed_on):
            firm[passed_on] = os.environ[passed_on]
    soft = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device_kind(recipe) != "npu":
        # Where torch_npu is installed without a device or CANN, importing torch fails unless this is 0.
        soft["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    if sys.platform == "linux":
        # All ranks are on this machine: a host name that doesn't resolve must not matter.
        soft["GLOO_SOCKET_IFNAME"] = "lo"
    return firm, soft


def render(run_dir: RunDirectory, recipe: Recipe) -> str:
    firm, soft = environment(run_dir, recipe)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", str(recipe.cluster.nproc), "--max-restarts", "0"),
        *("-m", RANK, str(run_dir.path)),
    ]
    # Relative paths of a recipe mean what they meant where the run was first launched.
    folder = Path(run_dir.provenance.get("cwd") or Path.cwd())
    logs = shlex.quote(str(run_dir.path / "logs" / "ascend"))
    npu = ascend.lines(ascend.variables(recipe, logs)) if device_kind(recipe) == "npu" else []
    return (
        "#!/usr/bin/env bash\n"
        f"# {run_dir.name}: {recipe.cluster.nproc} ranks on this machine, recipe {recipe.hash[:12]}.\n"
        f"# Started by its supervisor: python -m {SUPERVISOR} {shlex.quote(str(run_dir.path))}\n"
        "set -euo pipefail\n"
        f"cd {shlex.quote(str(folder if folder.is_dir() else Path.cwd()))}\n"
        f"{exports(firm, soft)}\n" + "".join(f"{line}\n" for line in npu) + f"exec {shlex.join(command)}\n"
    )


def submit(run_dir: RunDirectory, recipe: Recipe) -> str:
    script = run_dir.path / SCRIPT
    write_atomic(script, render(run_dir, recipe))
    script.chmod(0o755)
    run_dir.write_status(
        state="queued", launcher="local", host=socket.gethostname(), job=None, pid=None, world_size=None
    )
    with (run_dir.logs / "launcher.log").open("ab") as log:
        try:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", SUPERVISOR, str(run_dir.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            run_dir.write_status(state="failed", error=f"The supervisor could not be started: {error}.")
            raise RunError(f"{run_dir.name} could not be started ({error}): see {log.name}.") from None
    _started[:] = [process for process in _started if process.poll() is None] + [supervisor]
    job = f"{socket.gethostname()}:{supervisor.pid}"
    run_dir.write_status(job=job)
    return job


def status(run_dir: RunDirectory) -> JobState:
    stored = run_dir.status
    if stored.get("host") not in (None, socket.gethostname()):
        return JobState.UNKNOWN
    return JobState.RUNNING if _processes(run_dir, stored) else JobState.GONE


def describe(run_dir: RunDirectory) -> JobInfo:
    state = status(run_dir)
    host = run_dir.status.get("host")
    if state == JobState.UNKNOWN:
        return JobInfo(state, f"started on {host}, which only that machine can say more of")
    return JobInfo(state, nodes=(host,) if state == JobState.RUNNING else ())


def stop(run_dir: RunDirectory, checkpoint: bool = True) -> None:
    run_dir.request("checkpoint_and_stop" if checkpoint else "stop")
    stored = run_dir.status
    if stored.get("state") in ACTIVE:
        run_dir.write_status(state="stopping", heartbeat=stored.get("heartbeat"))
    processes = _processes(run_dir, stored)
    supervised = any(SUPERVISOR in _command(process) for process in processes)
    if not checkpoint and processes and not supervised:
        # Nobody is left who would insist: end the ranks from here.
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)


def logs(run_dir: RunDirectory, lines: int = 50, rank: int | None = None) -> str:
    return read_logs(run_dir.logs, lines, rank)


def check(recipe: Recipe, root: Path) -> str:
    options_of(recipe, "local")
    nodes = recipe.cluster.nodes
    if nodes > 1:
        raise LayoutError(
            f"cluster.nodes={nodes}, but the local launcher starts ranks on this machine alone: set cluster.launcher "
            "to a scheduler (slurm, volcano), or cluster.nodes=1."
        )
    return "Started on this machine, in a session of its own."


def _processes(run_dir: RunDirectory, stored: dict) -> list[psutil.Process]:
    """Supervisor and torchrun of the run, as far as they live on this machine.

    A number alone could meanwhile be another process: the command line must name this run.
    """
    numbers = [stored.get("pid"), str(stored.get("job") or "").rpartition(":")[2]]
    alive = []
    for number in numbers:
        if not number or not str(number).isdigit():
            continue
        try:
            process = psutil.Process(int(number))
        except psutil.Error:
            continue
        if str(run_dir.path) in _command(process) and process.status() != psutil.STATUS_ZOMBIE:
            alive.append(process)
    return alive


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
