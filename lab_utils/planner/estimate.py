"""What a recipe will cost before it is launched: tokens, FLOPs, memory and time, from counts and one measured peak.

Counts are exact (parameters on the meta device, FLOPs per token by the closed form of the model); time divides them by
the accelerator's measured peak and a stated utilisation, so it carries the word *predicted*. Memory is that of weights,
gradients and optimizer state on the fullest rank; activations come on top.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab_utils.errors import LayoutError

if TYPE_CHECKING:
    import pandas as pd

    from lab_utils.accelerators import Accelerator
    from lab_utils.recipe import Recipe

# Share of the matrix-product peak that training reaches: measured for the shipped model on two CPU cores (see
# docs/benchmarks.md); for accelerators the published V4-Pro run on 910C.
UTILISATION = {"cpu": 0.28, "cuda": 0.35, "npu": 0.35}
GIB = 2**30
# Share of a device's memory that may hold state: the rest is for activations and what the driver keeps.
ROOM = 0.8


@dataclass(frozen=True)
class Estimate:
    """Cost of a run; sizes in GiB a rank, FLOPs of one optimizer step over all ranks, times in seconds.

    ``device`` is the kind of device; ``device_gib`` a rank's share of its memory, ``host_gib`` what a rank keeps in
    host memory (``parallel.offload``). Peak and memory are None where the job runs on devices that aren't here.
    """

    parameters: int
    tokens_per_step: int
    steps: int
    ranks: int
    flops_per_step: float
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    host_gib: float
    device: str
    device_gib: float | None
    peak_flops: float | None
    utilisation: float
    step_seconds: float | None

    @property
    def total_seconds(self) -> float | None:
        return None if self.step_seconds is None else self.steps * self.step_seconds

    @property
    def device_hours(self) -> float | None:
        return None if self.total_seconds is None else self.total_seconds * self.ranks / 3600

    @property
    def state_gib(self) -> float:
        """Weights, gradients and optimizer state on a device."""
        return self.weights_gib + self.gradients_gib + self.optimizer_gib

    @property
    def fits(self) -> bool | None:
        """Whether they leave room for activations; None where the device's memory isn't known."""
        return None if self.device_gib is None else self.state_gib <= ROOM * self.device_gib

    def table(self) -> pd.DataFrame:
        """The estimate as a person reads it."""
        import pandas as pd

        return pd.DataFrame({"estimate": self.rows()})

    def rows(self) -> dict[str, str]:
        """The same as text by name."""
        step, total = self.step_seconds, self.total_seconds
        return {
            "parameters, every one trained": f"{self.parameters:,}",
            "tokens a step × steps": f"{self.tokens_per_step:,} × {self.steps:,}",
            "training FLOPs": f"{self.flops_per_step * self.steps:.3g}",
            "weights a rank": f"{self.weights_gib:.3f} GiB",
            "gradients a rank": f"{self.gradients_gib:.3f} GiB",
            "optimizer state a rank": f"{self.optimizer_gib:.3f} GiB",
            "peak a rank": f"{self.peak_flops / 1e12:.3g} TFLOP/s" if self.peak_flops else "unknown",
            "predicted step": f"{step:.2f} s at {100 * self.utilisation:.0f} % utilisation"
            if step
            else "unknown",
            "predicted run": f"{total / 60:.1f} minutes" if total else "unknown",
        }


def estimate(recipe: Recipe) -> Estimate:
    """The cost of ``recipe`` under its own layout.

    Raises:
        LayoutError: batch, rows and ranks do not divide.
        LabError: the model source cannot be described.
    """
    from lab_utils.models.load import describe

    recipe.layout()
    ranks, tokens = recipe.cluster.world_size, recipe.schedule.batch_tokens
    model = describe(recipe.model.source, document_length=recipe.data.row_tokens)
    weights, gradients, optimizer = _state_bytes(recipe, model["by_component"])
    kind, memory, peak = _device(recipe)
    utilisation = UTILISATION.get(kind, UTILISATION["npu"])
    flops = model["flops_per_token"] * tokens
    offload = recipe.parallel.offload
    return Estimate(
        parameters=model["parameters"],
        tokens_per_step=tokens,
        steps=recipe.schedule.steps,
        ranks=ranks,
        flops_per_step=flops,
        weights_gib=weights / GIB,
        gradients_gib=gradients / GIB,
        optimizer_gib=0.0 if offload else optimizer / GIB,
        host_gib=optimizer / GIB if offload else 0.0,
        device=kind,
        device_gib=memory / GIB if memory else None,
        peak_flops=peak,
        utilisation=utilisation,
        step_seconds=flops / (peak * ranks * utilisation) if peak else None,
    )


def knobs(recipe: Recipe, found: Estimate) -> list[str]:
    """What would make room where a run doesn't fit, the most effective first, as sentences; [] where it fits."""
    if found.fits is not False:
        return []
    parallel, advice = recipe.parallel, []
    dp = recipe.layout()[0] * parallel.cp
    if not parallel.zero and dp > 1:
        advice.append(f"parallel.zero=1 cuts the optimizer's state into {dp}.")
    if not parallel.offload and found.device != "cpu":
        advice.append("parallel.offload=true keeps the optimizer's state in host memory.")
    if recipe.model.dtype == "float32":
        advice.append("model.dtype=bfloat16 halves the weights; masters stay fp32, in the optimizer.")
    ranks = math.ceil(found.ranks * found.state_gib / (ROOM * (found.device_gib or 1)))
    more = f"it takes {ranks:,} ranks or more (cluster.nodes, cluster.nproc)"
    advice.append(f"parallel.ep and parallel.pp cut weights and gradients too: {more}.")
    return advice


def _state_bytes(recipe: Recipe, parts: dict[str, int]) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state on the fullest rank (docs/layouts.md: who holds what).

    Layers are taken to be cut evenly by pp; embedding and head lie on different stages. Gradients are fp32. AdamW keeps
    two fp32 moments, Muon one of its matrices, both an fp32 master copy below fp32.
    """
    parallel = recipe.parallel
    dp = recipe.layout()[0] * parallel.cp
    ends = [parts.get("embedding", 0), parts.get("head", 0)]
    experts = parts.get("routed experts", 0)
    layers = sum(parts.values()) - sum(ends) - experts
    own = {
        "experts": experts / parallel.ep / parallel.pp,
        "layers": layers / parallel.pp,
        "ends": float(sum(ends) if parallel.pp == 1 else max(ends)),
    }
    shards = {"experts": dp / parallel.ep, "layers": dp, "ends": dp} if parallel.zero else {}
    master = 0 if recipe.model.dtype == "float32" else 4
    moments = {part: 4 if recipe.optim.kind == "muon" and part != "ends" else 8 for part in own}
    optimizer = sum(n * (moments[part] + master) / shards.get(part, 1) for part, n in own.items())
    parameters = sum(own.values())
    return parameters * (4 if recipe.model.dtype == "float32" else 2), parameters * 4, optimizer


def _device(recipe: Recipe) -> tuple[str, float | None, float | None]:
    """Kind of the job's devices, a rank's memory in bytes and peak FLOP/s, as far as this machine can tell."""
    from lab_utils.accelerators import get_accelerator
    from lab_utils.registry import load
    from lab_utils.telemetry.chips import PROBES

    wanted = recipe.cluster.accelerator
    elsewhere = recipe.cluster.launcher != "local"
    if elsewhere and wanted == "auto":
        return "auto", None, None  # what the nodes have isn't known here
    try:
        accelerator = get_accelerator(wanted)
    except LayoutError:
        if elsewhere:
            return wanted, None, None
        raise
    peak = _peak(accelerator, recipe)
    try:
        memory = load(PROBES, accelerator.name).make(1).read()[0].total_mib
    except (OSError, RuntimeError, IndexError):  # no driver that answers
        memory = None
    ranks = recipe.cluster.nproc if accelerator.name == "cpu" else 1  # ranks on a CPU share its memory
    return accelerator.name, memory * 2**20 / ranks if memory else None, peak


def _peak(accelerator: Accelerator, recipe: Recipe) -> float | None:
    """FLOP/s of a rank's device; of a CPU what a rank's threads reach."""
    if accelerator.name != "cpu":
        return accelerator.peak(recipe.model.dtype).flops
    import torch

    kept = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        torch.set_num_threads(recipe.cluster.threads or max(1, cores // recipe.cluster.nproc))
        return accelerator.peak(recipe.model.dtype).flops
    finally:
        torch.set_num_threads(kept)
