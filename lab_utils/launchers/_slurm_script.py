"""The script that ``sbatch`` is given, and the settings of which it is made."""

from __future__ import annotations

import re
import sys

from pydantic import Field, field_validator

from lab_utils.launchers import _cluster
from lab_utils.launchers._base import SCRIPT, LauncherOptions, Variables, options_of
from lab_utils.launchers._slurm_queue import duration
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory

# sbatch keys that the script settles itself.
OWN = (
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "output",
    "error",
    "open-mode",
    "signal",
    "array",
    "wrap",
)
_WORD = r"^[^\s\"'`$\\#;&|<>()]+$"


class Options(LauncherOptions):
    """Settings of the site and the job; ``lab render RECIPE --launcher slurm`` shows what they make."""

    partition: str | None = Field(
        None, pattern=_WORD, description="Partition; absent: the cluster's default."
    )
    account: str | None = Field(None, pattern=_WORD, description="Account that is charged.")
    qos: str | None = Field(None, pattern=_WORD, description="Quality of service.")
    reservation: str | None = Field(None, pattern=_WORD, description="Reservation to run in.")
    constraint: str | None = Field(
        None, pattern=r"^[^\s\"'`$\\#;<>]+$", description="Features that nodes must have."
    )
    exclude: str | None = Field(
        None, pattern=r"^[^\s\"'`$\\#;&|<>()]+$", description="Nodes to leave out, as n[3,7]."
    )
    gres: str | None = Field(
        None,
        pattern=_WORD,
        description="Devices a node, as npu:16 or gpu:8; absent where the site gives whole nodes.",
    )
    hours: float | None = Field(None, gt=0, description="Time limit, hours; absent: the partition's.")
    exclusive: bool = Field(True, description="Whole nodes: no other job shares their cores and network.")
    cpus: int | None = Field(None, ge=1, description="CPU cores a node; absent: all of them, with exclusive.")
    memory: str | None = Field(
        None,
        pattern=r"^\d+[KMGT]?$",
        description="Host memory a node, as 900G; absent: all of it, with exclusive.",
    )
    requeue: bool = Field(
        True, description="Back into the queue when Slurm takes the nodes; the run resumes by itself."
    )
    grace_seconds: int = Field(
        120, ge=30, description="Seconds before the time limit at which a checkpoint is begun."
    )
    interface: str | None = Field(None, pattern=_WORD, description="Host network of the ranks, as bond0.")
    profile: str | None = Field(
        None,
        pattern=r"^\S+$",
        description="The cluster as the planner names it, as ascend-910c: its variables.",
    )
    cann: str | None = Field(
        None, description="CANN's set_env.sh; absent: the environment's own, else /usr/local/Ascend's."
    )
    python: str | None = Field(
        None, description="Python on the compute nodes, with torch_npu; absent: the one that launches."
    )
    setup: tuple[str, ...] = Field(
        (), description="Lines of bash that come first on every node, as module load cann."
    )
    environment: Variables = Field({}, description="More variables for the ranks; they win over ours.")
    sbatch: dict[str, str | int | bool] = Field(
        {}, description="More keys of sbatch, as {comment: alignment}; true makes a flag."
    )

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, given: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for key, value in given.items():
            if key in OWN:
                raise ValueError(
                    f"'{key}' is set by the script itself: leave it out (lab render shows the script)"
                )
            if not re.fullmatch(r"[a-z][a-z-]*", key) or "\n" in str(value):
                raise ValueError(f"'{key}' is no long key of sbatch: write comment for --comment")
        return given


# -- the script ----------------------------------------------------------------------------------------


def render(run_dir: RunDirectory, recipe: Recipe) -> str:
    options: Options = options_of(recipe, "slurm")
    kind = _cluster.device(recipe, options.gres)
    python = options.python or sys.executable
    cluster = recipe.cluster
    no_requeue = "" if options.requeue else " --no-requeue"
    srun = [
        f'exec "$python" -m {_cluster.SCHEDULED} slurm "$run"{no_requeue} --',
        "srun --unbuffered --kill-on-bad-exit=1 --export=ALL --cpu-bind=none",
        '--open-mode=append --output="${run//%/%%}/logs/node-%t.log"',
        f'bash "$run/{SCRIPT}" node',
    ]
    torchrun = _cluster.torchrun(recipe, '"$SLURM_NODEID"', '"$MASTER_ADDR"', '"$MASTER_PORT"')
    sections = [
        [
            "#!/usr/bin/env bash",
            f"# {run_dir.name}: {cluster.nodes} nodes × {cluster.nproc} ranks under Slurm, recipe {recipe.hash[:12]}.",
            "# Slurm starts this file on the first node; srun starts it again on every node, with the word node.",
            *_directives(run_dir, recipe, options),
            "set -euo pipefail",
        ],
        _cluster.names(run_dir, python),
        _cluster.site(options.setup),
        _cluster.cann(kind, options.cann, python),
        _cluster.environment(run_dir, recipe, kind, options.interface, options.environment),
        [
            'if [ "${1:-}" != node ]; then',
            "  # Ranks meet on the first node, at the address by which Slurm reaches it; the port is the job's own.",
            '  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "  address=$(scontrol show node -o \"$first\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p') || true",
            "  export MASTER_ADDR=${address:-$first}",
            "  export MASTER_PORT=$(( 10000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 20000 ))",
            *(["  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"] if options.cpus else []),
            "  # Stays with the job: heartbeat, final state, and back into the queue when Slurm wants the nodes.",
            f"  {_cluster.joined(srun, '    ')}",
            "fi",
        ],
        [
            "# Keeps the scheduler's signals from torchrun, which would give its ranks 30 s: they save instead.",
            f"exec {_cluster.joined(torchrun)}",
        ],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _directives(run_dir: RunDirectory, recipe: Recipe, options: Options) -> list[str]:
    """``#SBATCH`` lines; Slurm takes no remark behind one."""
    log = str(run_dir.path / "logs" / "launcher.log").replace("%", "%%")
    asked: dict[str, str | int | bool | None] = {
        "job-name": run_dir.name,
        "nodes": recipe.cluster.nodes,
        "ntasks-per-node": 1,
        "gres": options.gres,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "reservation": options.reservation,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "time": duration(options.hours) if options.hours else None,
        "exclusive": options.exclusive,
        "cpus-per-task": options.cpus,
        "mem": options.memory or ("0" if options.exclusive else None),
        "output": log,
        "open-mode": "append",
        "requeue" if options.requeue else "no-requeue": True,
        "signal": f"B:USR1@{options.grace_seconds}",
        **options.sbatch,
    }
    lines = []
    for key, value in asked.items():
        if value is True:
            lines.append(f"#SBATCH --{key}")
        elif value is not None and value is not False:
            text = str(value)
            lines.append(
                f"#SBATCH --{key}=" + (text if re.fullmatch(r"[\w@:.,/+=\[\]&|*-]+", text) else f'"{text}"')
            )
    return lines
