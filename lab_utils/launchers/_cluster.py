"""What the scripts of all schedulers share: the environment of a node, each line with its reason."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab_utils.ascend import environment as ascend
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory
from lab_utils.telemetry.wandb import environment as wandb_environment

SCHEDULED = "lab_utils.launchers._scheduled"
NODE = "lab_utils.launchers._node"
RANK = "lab_utils.launchers._rank"
# Where CANN's set_env.sh lies: in a conda environment (CANN 9, then 8), or as the administrator installed it.
CANN = (
    "{prefix}/Ascend/cann/set_env.sh",
    "{prefix}/Ascend/ascend-toolkit/set_env.sh",
    "/usr/local/Ascend/cann/set_env.sh",
    "/usr/local/Ascend/ascend-toolkit/set_env.sh",
)
# Variables of whoever launches that the ranks need too.
PASSED_ON = ("ASCENT_WORKER_MODULE", "ASCENT_ACCELERATOR", "PYTHONPATH")


def device(recipe: Recipe, resource: str | None) -> str:
    """The kind of device on the nodes: the recipe's, or what the resource that is asked for says, else ``auto``.

    This machine's own devices say nothing of a cluster's.
    """
    wanted = os.environ.get("ASCENT_ACCELERATOR") or recipe.cluster.accelerator
    if wanted != "auto" or not resource:
        return wanted
    name = resource.lower()
    return "npu" if "npu" in name or "ascend" in name else "cuda" if "gpu" in name else "auto"


def folder_of(run_dir: RunDirectory) -> str:
    """Where the job runs: relative paths of a recipe mean what they meant where the run was first launched."""
    return str(Path(run_dir.provenance.get("cwd") or Path.cwd()))


def names(run_dir: RunDirectory, python: str) -> list[str]:
    """Lines that name the run and the interpreter, end a node that doesn't see the run, and go to its folder."""
    advice = "runs must lie on a file system that every node sees (ASCENT_RUNS)"
    return [
        f"run={shlex.quote(str(run_dir.path))}",
        f"python={shlex.quote(python)}",
        f'[ -d "$run" ] || {{ echo "error: $(hostname) does not see $run: {advice}" >&2; exit 1; }}',
        f"cd {shlex.quote(folder_of(run_dir))}",
    ]


def site(lines: Sequence[str]) -> list[str]:
    """The site's own lines; modules and conda use variables that may be unset."""
    return ["# cluster.options.setup", "set +u", *lines, "set -u"] if lines else []


def cann(kind: str, given: str | None, python: str) -> list[str]:
    """Lines that set up CANN on a node with NPUs; none for other devices."""
    if kind not in ("npu", "auto"):
        return []
    why = "# CANN: libraries and paths of the NPUs (its script uses variables that may be unset)"
    if given:
        missing = f'echo "error: {given} is not on $(hostname): set cluster.options.cann" >&2; exit 1'
        return [why, f'[ -r "{given}" ] || {{ {missing}; }}', f'set +u; source "{given}"; set -u']
    prefix = str(Path(python).parents[1]) if Path(python).is_absolute() else "${CONDA_PREFIX:-/nowhere}"
    return [
        why,
        "for file in " + " ".join(f'"{path.format(prefix=prefix)}"' for path in CANN) + "; do",
        '  if [ -r "$file" ]; then set +u; source "$file"; set -u; break; fi',
        "done",
    ]


def environment(
    run_dir: RunDirectory, recipe: Recipe, kind: str, interface: str | None, extra: Mapping[str, str]
) -> list[str]:
    """Lines of bash that give the ranks their variables, in groups under a comment that says why."""
    threads = recipe.cluster.threads
    lines = [
        "# CPU threads: the node's cores shared among its ranks",
        f"threads={threads}"
        if threads
        else f"threads=$(( $(env -u OMP_NUM_THREADS nproc) / {recipe.cluster.nproc} ))",
        "export OMP_NUM_THREADS=$(( threads > 0 ? threads : 1 ))",
        "export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false",
        "# Nothing calls out: W&B keeps its files in the run, the hub is offline unless you say otherwise",
        *_exports(wandb_environment(run_dir.path, recipe.tracking), run_dir),
        "export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}",
    ]
    passed = {key: os.environ[key] for key in PASSED_ON if os.environ.get(key)}
    if passed:
        lines += ["# As where the run was launched", *_exports(passed)]
    if kind in ("npu", "auto"):
        lines += ascend.lines(ascend.variables(recipe, '"$run/logs/ascend"'))
    else:
        lines += [
            "# An installed torch_npu without CANN would break `import torch`",
            "export TORCH_DEVICE_BACKEND_AUTOLOAD=0",
        ]
    if interface:
        lines += [
            "# The host network that ranks meet on; without it the first interface is taken",
            *_exports({"GLOO_SOCKET_IFNAME": interface, "HCCL_SOCKET_IFNAME": interface}),
        ]
    if extra:
        lines += ["# cluster.options.environment", *_exports(extra)]
    return lines


def torchrun(recipe: Recipe, rank: str, address: str, port: str) -> list[str]:
    """The command of a node, as pieces of bash; ``rank``, ``address`` and ``port`` are pieces already."""
    return [
        f'"$python" -m {NODE} "$run" --',
        '"$python" -m torch.distributed.run',
        f"--nnodes {recipe.cluster.nodes} --node-rank {rank} --nproc-per-node {recipe.cluster.nproc}",
        f"--master-addr {address} --master-port {port} --max-restarts 0",
        "--signals-to-handle SIGINT,SIGHUP,SIGQUIT",
        f'-m {RANK} "$run"',
    ]


def joined(pieces: Sequence[str], indent: str = "  ") -> str:
    """Pieces of one command on lines of their own."""
    return f" \\\n{indent}".join(pieces)


def _exports(variables: Mapping[str, str], run_dir: RunDirectory | None = None) -> list[str]:
    lines = []
    for key, value in variables.items():
        inside = run_dir is not None and str(value).startswith(str(run_dir.path))
        text = f'"$run{str(value)[len(str(run_dir.path)) :]}"' if inside else shlex.quote(str(value))
        lines.append(f"export {key}={text}")
    return lines
