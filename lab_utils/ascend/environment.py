"""The environment of ranks on NPUs: each variable with its value for a recipe and a cluster, its reason and its source.

Launch scripts are given ``lines``; ``problems`` looks at an environment as a node has it (``lab doctor``, and the start
of every node of a job). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lab_utils.errors import LabError
from lab_utils.recipe import Recipe

CANN = "CANN's environment-variable reference"
TORCH_NPU = "TorchNPU's environment-variable reference"
MINDSPEED = "as MindSpeed-LLM's pre-training scripts"
FEW, MANY = 1800, 3600  # seconds until every rank must have arrived
THOUSAND = 1024  # ranks from which on it takes the longer of the two
SMOKE_STEPS = 20  # a run of so few steps is there to find out whether things work
# What a cluster's name, or a node's label on Kubernetes, says of the product.
PRODUCTS = {"ascend-910c": "A3", "ascend-910b": "A2", "module-a3": "A3", "module-910b": "A2"}


@dataclass(frozen=True)
class Variable:
    """One variable.

    Attributes:
        value: as a word of bash; None: it must not be set.
        reason: a sentence without its full stop.
        read_by: whose it is; what torch or torch_npu read can be looked for in their wheels.
        firm: wins over what the user has set.
        unless: another variable that takes this one's place.
    """

    name: str
    value: str | None
    reason: str
    source: str
    read_by: Literal["torch", "torch_npu", "hccl", "cann"]
    firm: bool = False
    unless: str | None = None


def product(recipe: Recipe) -> str | None:
    """``A2`` (910B) or ``A3`` (910C), where the launcher's settings name the cluster or the kind of node."""
    options = recipe.cluster.options
    said = str(options.get("profile") or options.get("accelerator_type") or "")
    return next((name for start, name in PRODUCTS.items() if said.startswith(start)), None)


def buffer_mb(recipe: Recipe) -> int | None:
    """``HCCL_BUFFSIZE`` in MB: one micro-batch's hidden states; None where the model's width is not known here.

    Each communicator has it twice, in the device's memory.
    """
    from lab_utils.planner.memory import hccl_buffer
    from lab_utils.planner.numbers import numbers

    try:
        width = numbers(recipe.model.source).hidden_size
        rows = recipe.layout(recipe.cluster.world_size)[1]
    except LabError:
        return None
    return hccl_buffer(width, rows * recipe.data.row_tokens // recipe.parallel.cp, recipe.model.dtype)


def variables(recipe: Recipe, log_folder: str) -> list[Variable]:
    """What the ranks of a recipe need on NPUs.

    Args:
        log_folder: where CANN shall write its logs, as a word of bash.
    """
    ranks, which, buffer = recipe.cluster.world_size, product(recipe), buffer_mb(recipe)
    found = [
        Variable(
            "TORCH_DEVICE_BACKEND_AUTOLOAD",
            "1",
            "torch loads torch_npu by itself",
            TORCH_NPU,
            "torch",
            firm=True,
        ),
        Variable(
            "HCCL_CONNECT_TIMEOUT",
            str(MANY if ranks >= THOUSAND else FEW),
            f"{ranks} ranks arrive minutes apart (imports from a shared file system); CANN waits 120 s",
            CANN,
            "hccl",
        ),
        Variable(
            "HCCL_EXEC_TIMEOUT",
            "3600",
            "A collective must outlast the longest checkpoint or evaluation",
            CANN,
            "hccl",
        ),
        Variable(
            "HCCL_EVENT_TIMEOUT",
            "3660",
            "It must be the longer one, or it ends what still waits",
            CANN,
            "hccl",
        ),
        Variable(
            "HCCL_DETERMINISTIC",
            "true",
            "The same order of sums at every step: a resumed run goes on with the same bits",
            CANN,
            "hccl",
        ),
    ]
    if which == "A3":
        why = "A3: collectives unfold on the chip, always in the same order; AIV is not for training"
        found.append(Variable("HCCL_OP_EXPANSION_MODE", "AI_CPU", why, CANN, "hccl"))
    if buffer is not None:
        from lab_utils.planner.memory import LEAST_BUFFER

        why = f"One micro-batch's hidden states, {LEAST_BUFFER} MB at least; each communicator takes it twice from HBM"
        found.append(Variable("HCCL_BUFFSIZE", str(buffer), why, CANN, "hccl"))
    found += [
        Variable(
            "TORCH_HCCL_ASYNC_ERROR_HANDLING",
            "1",
            "A rank whose peers are gone ends instead of waiting for the time-out",
            TORCH_NPU,
            "torch_npu",
        ),
        Variable(
            "PYTORCH_NPU_ALLOC_CONF",
            "expandable_segments:True",
            "Fewer failures by fragmented memory (with PYTORCH_ALLOC_CONF besides it would be an error)",
            MINDSPEED,
            "torch_npu",
            unless="PYTORCH_ALLOC_CONF",
        ),
        Variable(
            "TASK_QUEUE_ENABLE",
            "1",
            "Launches are queued; 2 prepares them beside, faster, at a peak of memory that the plan doesn't count",
            TORCH_NPU,
            "torch_npu",
        ),
        Variable("CPU_AFFINITY_CONF", "1", "Each rank on the cores of its own chip", MINDSPEED, "torch_npu"),
    ]
    if recipe.schedule.steps <= SMOKE_STEPS:
        why = f"{recipe.schedule.steps} steps are a smoke run: an operator without an NPU kernel fails, not falls back"
        found.append(Variable("TORCH_NPU_FALLBACK_CPU_DISABLE", "1", why, TORCH_NPU, "torch_npu"))
    return [
        *found,
        Variable(
            "RANK_TABLE_FILE",
            None,
            "torchrun gives the ranks; a table that disagrees fails late",
            CANN,
            "hccl",
        ),
        Variable(
            "ASCEND_PROCESS_LOG_PATH",
            log_folder,
            "plogs of every rank in the run, where a failure's first error is looked for",
            CANN,
            "cann",
            firm=True,
        ),
    ]


def lines(found: Sequence[Variable]) -> list[str]:
    """Lines of bash, each variable under a comment that says why."""
    out: list[str] = []
    for v in found:
        out.append(f"# {v.reason} [{v.source}]")
        if v.value is None:
            out.append(f"unset {v.name}")
        elif v.firm:
            out.append(f"export {v.name}={v.value}")
        else:
            other = f'[ "${{{v.unless}:-}}" ] || ' if v.unless else ""
            out.append(f"{other}export {v.name}=${{{v.name}:-{v.value}}}")
    return out


@dataclass(frozen=True)
class Problem:
    """A variable of a node that would spoil a job."""

    name: str
    found: str
    advice: str


def problems(environ: Mapping[str, str]) -> list[Problem]:
    """What is wrong with the variables that are set; one that isn't is none, scripts set it."""
    out = []

    def add(name: str, found: Any, advice: str) -> None:
        out.append(Problem(name, f"{name}={found}", advice))

    if environ.get("RANK_TABLE_FILE"):
        advice = (
            "unset RANK_TABLE_FILE: torchrun gives the ranks, and a table that disagrees fails late (EI0004)."
        )
        add("RANK_TABLE_FILE", environ["RANK_TABLE_FILE"], advice)
    if environ.get("PYTORCH_ALLOC_CONF") and environ.get("PYTORCH_NPU_ALLOC_CONF"):
        add(
            "PYTORCH_ALLOC_CONF",
            environ["PYTORCH_ALLOC_CONF"],
            "unset one of the two: both set are an error.",
        )
    for name, (least, most) in RANGES.items():
        if name in environ and (
            _number(environ[name]) is None or not least <= _number(environ[name]) <= most
        ):
            add(name, environ[name], f"Give a whole number from {least} to {most}, or unset it.")
    for name, allowed in WORDS.items():
        if name in environ and environ[name] not in allowed:
            add(name, environ[name], f"Give {' or '.join(allowed)}, or unset it.")
    wait, event = (_number(environ.get(f"HCCL_{name}_TIMEOUT")) for name in ("EXEC", "EVENT"))
    if event is not None and wait is not None and event <= wait:
        add("HCCL_EVENT_TIMEOUT", event, f"It must be above HCCL_EXEC_TIMEOUT={wait}: give {wait + 60}.")
    if environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        add("TORCH_DEVICE_BACKEND_AUTOLOAD", "0", "unset it on compute nodes: it keeps torch_npu away.")
    if environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        add(
            "ASCEND_LAUNCH_BLOCKING",
            "1",
            "unset it once the error is found: every launch waits for the chip.",
        )
    return out


# Of CANN's and TorchNPU's references: what the variables take.
RANGES = {
    "HCCL_CONNECT_TIMEOUT": (120, 7200),
    "HCCL_EXEC_TIMEOUT": (0, 2147483647),
    "HCCL_EVENT_TIMEOUT": (0, 2147483647),
    "HCCL_BUFFSIZE": (1, 65536),
    "TASK_QUEUE_ENABLE": (0, 2),
}
WORDS = {
    "HCCL_DETERMINISTIC": ("true", "false", "strict"),
    "HCCL_OP_EXPANSION_MODE": ("AI_CPU", "HOST"),
    "TORCH_NPU_FALLBACK_CPU_DISABLE": ("0", "1"),
}


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
