"""Slurm: a script for ``sbatch`` that can be read before it is submitted, one torchrun a node.

The script runs on the first node, where a supervisor (``_scheduled``) starts ``srun``; on every node the same script
starts torchrun. A job that has to leave (time limit, preemption) saves a checkpoint, queues itself again, and resumes.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from pathlib import Path

from lab_utils.errors import RunError
from lab_utils.launchers._base import SCRIPT, JobInfo, options_of, read_logs
from lab_utils.launchers._slurm_queue import (
    QUEUE,
    Job,
    Refused,
    Unreachable,
    first_of,
    host_names,
    run,
    seconds,
)
from lab_utils.launchers._slurm_script import Options, render
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory, write_atomic
from lab_utils.runs.states import ACTIVE, FINAL, JobState

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun")
PENDING = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
}
RUNNING = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING", "SUSPENDED"}
# Words of Slurm for why a job waits or can't be had, and what they mean to its owner.
REASONS = {
    "Priority": "others are before it",
    "Resources": "it is next, and waits for nodes",
    "BeginTime": "it was queued again and may start in a moment",
    "Dependency": "it waits for another job",
    "JobHeldUser": "it is held: scontrol release",
    "JobHeldAdmin": "the administrator holds it",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "PartitionTimeLimit": "it asks for more time than the partition gives: lower cluster.options.hours",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives: lower cluster.nodes",
    "PartitionConfig": "the partition cannot give what it asks for: lab render shows the request",
    "Licenses": "it waits for a licence",
}


# -- the job -------------------------------------------------------------------------------------------


def submit(run_dir: RunDirectory, recipe: Recipe) -> str:
    script = run_dir.path / SCRIPT
    write_atomic(script, render(run_dir, recipe))
    script.chmod(0o755)
    (run_dir.path / "logs").mkdir(exist_ok=True)
    run_dir.write_status(state="queued", launcher="slurm", job=None, pid=None, world_size=None, restarts=0)
    try:
        answer = run("sbatch", "--parsable", str(script))
    except (Unreachable, Refused) as error:
        text = f"Slurm did not take the job: {str(error).removeprefix('sbatch: error: ').rstrip('.')}"
        text = f"{text}: see {script}, and lab render --options slurm for the settings."
        run_dir.write_status(state="failed", error=text)
        raise RunError(text) from None
    job = answer.strip().splitlines()[-1].partition(";")[0]
    run_dir.write_status(job=job)
    QUEUE.forget()
    return job


def status(run_dir: RunDirectory) -> JobState:
    try:
        return _state(_job(run_dir))
    except Unreachable:
        return JobState.UNKNOWN


def describe(run_dir: RunDirectory) -> JobInfo:
    restarts = int(run_dir.status.get("restarts") or 0)
    try:
        job = _job(run_dir)
    except Unreachable as error:
        return JobInfo(JobState.UNKNOWN, f"Slurm cannot be asked from here: {error}", restarts=restarts)
    state = _state(job)
    if job is None:
        return JobInfo(state, restarts=restarts)
    if state == JobState.PENDING:
        return JobInfo(state, _why(job), QUEUE.position(job), None, restarts)
    if state == JobState.GONE:
        return JobInfo(state, job.state.lower(), restarts=restarts)
    detail = "" if job.state == "RUNNING" else job.state.lower()
    return JobInfo(state, detail, None, seconds(job.left), restarts, host_names(job.nodes))


def stop(run_dir: RunDirectory, checkpoint: bool = True) -> None:
    run_dir.request("checkpoint_and_stop" if checkpoint else "stop")
    stored = run_dir.status
    if stored.get("state") in ACTIVE:
        run_dir.write_status(state="stopping", heartbeat=stored.get("heartbeat"))
    job = stored.get("job")
    if not job or (stored.get("state") in FINAL and stored.get("finished")):
        return
    QUEUE.forget()
    if status(run_dir) == JobState.PENDING:
        # Only while it waits: one that has started in this moment hears the request instead.
        with contextlib.suppress(Unreachable, Refused):
            run("scancel", "--state=PENDING", str(job))
        QUEUE.forget()
        if status(run_dir) == JobState.GONE:
            run_dir.write_status(state="stopped", finished=time.time())


def logs(run_dir: RunDirectory, lines: int = 50, rank: int | None = None) -> str:
    return read_logs(run_dir.logs, lines, rank)


def _job(run_dir: RunDirectory) -> Job | None:
    """The run's job; None where it is gone. A number that another cluster gave to somebody else's job is not it."""
    stored = run_dir.status
    number = str(stored.get("job") or "")
    if not number.isdigit() or (stored.get("state") in FINAL and stored.get("finished")):
        return None
    job = QUEUE.job(number)
    return job if job is not None and job.name == run_dir.name else None


def _state(job: Job | None) -> JobState:
    if job is None:
        return JobState.GONE
    if job.state in PENDING:
        return JobState.PENDING
    return JobState.RUNNING if job.state in RUNNING else JobState.GONE


def _why(job: Job) -> str:
    known = next((text for key, text in REASONS.items() if job.reason.startswith(key)), None)
    if known is None and re.match(r"(QOS|Assoc|MaxSubmit)", job.reason):
        known = "a limit of the account or its quality of service is reached"
    why = f"{job.reason}: {known}" if known else job.reason
    start = re.match(r"\d{4}-(\d\d-\d\d)T(\d\d:\d\d)", job.start)
    return f"{why}, expected to start {start[1]} {start[2]}" if start and job.reason != "BeginTime" else why


# -- before a start ------------------------------------------------------------------------------------


def check(recipe: Recipe, root: Path) -> str:
    options_of(recipe, "slurm")
    for command in COMMANDS:
        if not shutil.which(command):
            raise RunError(
                f"cluster.launcher is slurm, but {command} is not on this machine: launch on a login node of the "
                "cluster, or set cluster.launcher=local."
            )
    return f"Slurm's commands are here; taken for granted: every node sees {root.resolve()} (its script looks first)."


def queue(recipe: Recipe) -> str:
    """What the job will meet: nodes of the partition, how many are idle, how many jobs wait.

    Raises:
        RunError: there is no such partition, or it can never give what is asked for.
    """
    options: Options = options_of(recipe, "slurm")
    nodes = recipe.cluster.nodes
    lines = first_of(lambda: run("sinfo", "--noheader", "--format=%R|%D|%t|%l")).splitlines()
    if not lines:
        return "The queue cannot be asked (sinfo has no answer); the job would wait there."
    rows = [line.split("|") for line in lines if line.count("|") == 3]
    names = list(dict.fromkeys(row[0] for row in rows))
    if options.partition:
        wanted = options.partition.split(",")
    else:
        default = first_of(lambda: run("sinfo", "--noheader", "--format=%P")).split()
        wanted = [name.removesuffix("*") for name in default if name.endswith("*")] or names
    rows = [row for row in rows if row[0] in wanted]
    if not rows:
        raise RunError(
            f"cluster.options.partition: Slurm has no partition '{options.partition}'; it has {', '.join(names)}."
        )
    total = sum(int(row[1]) for row in rows)
    if nodes > total:
        raise RunError(
            f"cluster.nodes={nodes}, but {', '.join(wanted)} has {total} nodes: lower it, or set a partition."
        )
    limit = max((seconds(row[3]) or float("inf") for row in rows), default=float("inf"))
    if options.hours and options.hours * 3600 > limit:
        raise RunError(
            f"cluster.options.hours={options.hours:g}, but {', '.join(wanted)} gives at most {limit / 3600:g}: lower "
            "it (a job that reaches its limit saves, queues itself again and goes on)."
        )
    idle = sum(int(row[1]) for row in rows if row[2].rstrip("*~#").startswith("idle"))
    words = ["--states=PENDING", "--format=%i", f"--partition={','.join(wanted)}"]
    waiting = len(first_of(lambda: run("squeue", "--noheader", *words)).split())
    return f"{', '.join(wanted)}: {idle} of {total} nodes idle, {waiting} jobs wait; {nodes} nodes asked for."
