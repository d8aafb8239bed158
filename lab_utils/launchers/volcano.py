"""Kubernetes with Volcano: a manifest for ``kubectl``, one pod a node, each with a torchrun of its own.

The run's folder lies on a volume that the pods and this machine see under the same path. A supervisor in the first pod
keeps the heartbeat and the final state. An evicted job saves a checkpoint, is started again by its controller, and
resumes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from lab_utils.errors import LabError, RecipeError, RunError
from lab_utils.launchers._base import JobInfo, options_of, read_logs
from lab_utils.launchers._manifest import (
    MANAGED,
    MANIFEST,
    NPU,
    RUN_LABEL,
    job_name,
    manifest,
    render,
    validate,
)
from lab_utils.launchers._volcano_options import Options
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory, write_atomic
from lab_utils.runs.states import ACTIVE, FINAL, JobState

__all__ = ["Options", "check", "describe", "logs", "queue", "render", "status", "stop", "submit"]

FRESH = 10.0  # seconds that an answer of the cluster is good for
TIMEOUT = 15.0
RESOURCE = {"AscendJob": "ascendjobs.mindxdl.gitee.com", "Job": "jobs.batch.volcano.sh"}
STATES = {
    **dict.fromkeys(("", "Pending", "Restarting", "Created"), JobState.PENDING),
    **dict.fromkeys(("Running", "Completing", "Aborting", "Terminating"), JobState.RUNNING),
}


class Unreachable(Exception):
    """The cluster cannot be asked from here."""


def submit(run_dir: RunDirectory, recipe: Recipe) -> str:
    options: Options = options_of(recipe, "volcano")
    file = run_dir.path / MANIFEST
    write_atomic(file, render(run_dir, recipe))
    (run_dir.path / "logs").mkdir(exist_ok=True)
    run_dir.write_status(state="queued", launcher="volcano", job=None, pid=None, world_size=None, restarts=0)
    job = f"{options.namespace}/{job_name(run_dir.name)}"
    try:
        # What an earlier attempt has left under this name.
        _kubectl(
            options, "delete", RESOURCE[options.kind], job_name(run_dir.name), "--ignore-not-found", wait=120
        )
        _kubectl(options, "create", "-f", str(file))
    except (Unreachable, RunError) as error:
        text = f"Kubernetes did not take the job: {str(error).rstrip('.')}: see {file}."
        run_dir.write_status(state="failed", error=text)
        raise RunError(text) from None
    run_dir.write_status(job=job)
    _forget()
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
        state = _state(job)
        pods = _pods(run_dir) if state in (JobState.PENDING, JobState.RUNNING) else []
    except Unreachable as error:
        return JobInfo(JobState.UNKNOWN, f"Kubernetes cannot be asked from here: {error}", restarts=restarts)
    if job is None:
        return JobInfo(state, restarts=restarts)
    restarts = max(restarts, int(job.get("status", {}).get("retryCount") or 0))
    detail = _why(job, pods)
    nodes = tuple(pod["spec"]["nodeName"] for pod in pods if pod.get("spec", {}).get("nodeName"))
    return JobInfo(state, detail, None, None, restarts, nodes)


def stop(run_dir: RunDirectory, checkpoint: bool = True) -> None:
    run_dir.request("checkpoint_and_stop" if checkpoint else "stop")
    stored = run_dir.status
    if stored.get("state") in ACTIVE:
        run_dir.write_status(state="stopping", heartbeat=stored.get("heartbeat"))
    _forget()
    if status(run_dir) == JobState.PENDING:
        options: Options = options_of(run_dir.recipe, "volcano")
        try:
            name = job_name(run_dir.name)
            _kubectl(options, "delete", RESOURCE[options.kind], name, "--ignore-not-found", "--wait=false")
        except (Unreachable, RunError):
            return  # the pods hear the request when they start
        _forget()
        run_dir.write_status(state="stopped", finished=time.time())


def logs(run_dir: RunDirectory, lines: int = 50, rank: int | None = None) -> str:
    found = read_logs(run_dir.path / "logs", lines, rank)
    if found or rank is not None or not run_dir.status.get("job"):
        return found
    # Nothing in the run's folder yet: what the containers themselves have said.
    try:
        options: Options = options_of(run_dir.recipe, "volcano")
        which = f"--selector={RUN_LABEL}={job_name(run_dir.name)}"
        return _kubectl(
            options, "logs", which, f"--tail={lines}", "--prefix", "--max-log-requests=64"
        ).strip()
    except (LabError, Unreachable):
        return ""


# -- asking the cluster --------------------------------------------------------------------------------

_lock = threading.RLock()
_answers: dict[tuple[str, ...], tuple[float, list[dict[str, Any]] | Unreachable]] = {}


def _kubectl(options: Options, *words: str, wait: float = TIMEOUT) -> str:
    """The answer of kubectl.

    Raises:
        Unreachable: there is no kubectl, no cluster, or no right to ask.
        RunError: the cluster said no.
    """
    context = [f"--context={options.context}"] if options.context else []
    command = ["kubectl", *context, f"--namespace={options.namespace}", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=wait)
    except FileNotFoundError:
        raise Unreachable("kubectl is not installed here") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise Unreachable(f"kubectl did not answer: {error}") from None
    if done.returncode == 0:
        return done.stdout
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if re.search(
        r"(?i)unable to connect|connection to the server|refused|timeout|forbidden|unauthorized|no such host",
        said,
    ):
        raise Unreachable(said)
    raise RunError(said)


def _listed(options: Options, what: str, label: str) -> list[dict[str, Any]]:
    """Objects of a kind that carry a label, asked for at most every ``FRESH`` seconds."""
    key = (str(options.context), options.namespace, what, label)
    with _lock:
        at, answer = _answers.get(key, (-1e9, []))
        if time.monotonic() - at > FRESH:
            try:
                text = _kubectl(options, "get", what, f"--selector={label}", "--output=json")
                answer = json.loads(text).get("items", [])
            except Unreachable as error:
                answer = error
            except (RunError, ValueError) as error:  # no such kind here, or an answer of another form
                answer = Unreachable(str(error))
            _answers[key] = (time.monotonic(), answer)
        if isinstance(answer, Unreachable):
            raise answer
        return answer


def _forget() -> None:
    with _lock:
        _answers.clear()


def _job(run_dir: RunDirectory) -> dict[str, Any] | None:
    stored = run_dir.status
    if not stored.get("job") or (stored.get("state") in FINAL and stored.get("finished")):
        return None
    try:
        options: Options = options_of(run_dir.recipe, "volcano")
    except RecipeError as error:
        raise Unreachable(str(error)) from None
    label = ",".join(f"{key}={value}" for key, value in MANAGED.items())
    jobs = _listed(options, RESOURCE[options.kind], label)
    return next((job for job in jobs if job["metadata"]["name"] == job_name(run_dir.name)), None)


def _pods(run_dir: RunDirectory) -> list[dict[str, Any]]:
    options: Options = options_of(run_dir.recipe, "volcano")
    pods = _listed(options, "pods", f"{RUN_LABEL}={job_name(run_dir.name)}")
    return sorted(pods, key=lambda pod: _by_number(pod["metadata"]["name"]))


def _by_number(name: str) -> tuple[bool, int]:
    """``…-master-0`` first, then by number."""
    number = name.rpartition("-")[2]
    return "master" not in name, int(number) if number.isdigit() else 0


def _phase(job: dict[str, Any]) -> str:
    """Volcano names a phase; the Ascend operator adds conditions, the newest last."""
    found = job.get("status") or {}
    if phase := (found.get("state") or {}).get("phase"):
        return phase
    true = [each["type"] for each in found.get("conditions") or [] if each.get("status") == "True"]
    return true[-1] if true else ""


def _state(job: dict[str, Any] | None) -> JobState:
    return JobState.GONE if job is None else STATES.get(_phase(job), JobState.GONE)


def _why(job: dict[str, Any], pods: list[dict[str, Any]]) -> str:
    """What holds the job up, or how it ended: the pods know it better than the job."""
    for pod in pods:
        found = pod.get("status") or {}
        for container in found.get("containerStatuses") or []:
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
        for condition in found.get("conditions") or []:
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                return f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    found = job.get("status") or {}
    state = found.get("state") or next(iter(reversed(found.get("conditions") or [])), {})
    phase = _phase(job) or "Pending"
    said = state.get("message") or state.get("reason") or ""
    return "" if phase == "Running" else f"{phase}: {said}".rstrip(": ")


# -- before a start ------------------------------------------------------------------------------------


def check(recipe: Recipe, root: Path) -> str:
    options: Options = options_of(recipe, "volcano")
    runs = root.resolve()
    if not any(runs.is_relative_to(volume.path) and not volume.read_only for volume in options.volumes):
        raise RecipeError(
            f"cluster.options.volumes: none holds the folder of runs, {runs}: give the pods the volume that it lies "
            "on, under the same path, as [{path: /data, claim: data}], or point ASCENT_RUNS there."
        )
    world, chips = recipe.cluster.world_size, options.chips or recipe.cluster.nproc
    if options.sp_block and (
        world % options.sp_block or (recipe.cluster.nodes > 1 and options.sp_block % chips)
    ):
        raise RecipeError(
            f"cluster.options.sp_block={options.sp_block} must divide the {world} devices of the job and be a multiple "
            f"of the {chips} of a node: use {chips if recipe.cluster.nodes > 1 else world}."
        )
    if (
        "a3" in (options.accelerator_type or "")
        and (options.resource or NPU) == NPU
        and chips > 1
        and chips % 2
    ):
        raise RecipeError(
            f"A pod on a 910C takes one or an even number of devices, not {chips}: change cluster.nproc."
        )
    validate(manifest(RunDirectory(runs / recipe.name), recipe))
    if not shutil.which("kubectl"):
        raise RunError(
            "cluster.launcher is volcano, but kubectl is not on this machine: launch where it is, or take the manifest "
            "of lab render there."
        )
    return f"kubectl is here; taken for granted: the pods find {runs} on the volume that you name for it."


def queue(recipe: Recipe) -> str:
    """What the job will meet in its queue.

    Raises:
        RunError: there is no such queue.
    """
    options: Options = options_of(recipe, "volcano")
    try:
        text = _kubectl(options, "get", "queues.scheduling.volcano.sh", options.queue, "--output=json")
        found = json.loads(text)
    except Unreachable as error:
        return f"The queue cannot be asked ({error}); the job would wait there."
    except RunError as error:
        raise RunError(
            f"cluster.options.queue: Volcano has no queue '{options.queue}' ({error}): kubectl get queues lists them."
        ) from None
    except ValueError:
        return "The queue cannot be asked (an answer of another form); the job would wait there."
    state = found.get("status") or {}
    if state.get("state", "Open") != "Open":
        raise RunError(
            f"cluster.options.queue: the queue '{options.queue}' is {state['state']}, and takes no jobs."
        )
    counts = ", ".join(
        f"{int(state.get(key) or 0)} {word}" for key, word in (("running", "run"), ("pending", "wait"))
    )
    return f"Queue {options.queue}: of its jobs {counts}; {recipe.cluster.nodes} pods asked for."
