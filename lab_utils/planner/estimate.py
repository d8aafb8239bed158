"""What a recipe will cost before it is launched: tokens, FLOPs, memory and time, from counts and one measured peak.

Counts are exact (parameters on the meta device, FLOPs per token by the closed form of the model); time divides them by
the accelerator's measured peak and a stated utilisation, so it carries the word *predicted*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from lab_utils.recipe import Recipe

# Share of the matrix-product peak that training reaches: measured for the shipped model on two CPU cores (see
# docs/benchmarks.md); for accelerators the published V4-Pro run on 910C.
UTILISATION = {"cpu": 0.28, "cuda": 0.35, "npu": 0.35}
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Cost of a run; sizes in GiB a rank, FLOPs of one optimizer step over all ranks, times in seconds."""

    parameters: int
    tokens_per_step: int
    steps: int
    flops_per_step: float
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    peak_flops: float | None
    utilisation: float
    step_seconds: float | None

    @property
    def total_seconds(self) -> float | None:
        return None if self.step_seconds is None else self.steps * self.step_seconds

    def table(self) -> pd.DataFrame:
        """The estimate as a person reads it."""
        import pandas as pd

        step, total = self.step_seconds, self.total_seconds
        rows = {
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
        return pd.DataFrame({"estimate": rows})


def estimate(recipe: Recipe) -> Estimate:
    """The cost of ``recipe`` under its own layout.

    Raises:
        LayoutError: batch, rows and ranks do not divide.
        LabError: the model source cannot be described.
    """
    from lab_utils.accelerators import get_accelerator
    from lab_utils.models.load import describe

    ranks, _, _ = recipe.layout()
    model = describe(recipe.model.source, document_length=recipe.data.row_tokens)
    parameters = model["parameters"]
    shards = ranks if recipe.parallel.zero else 1
    working = 4 if recipe.model.dtype == "float32" else 2
    # AdamW keeps two fp32 moments, and an fp32 master copy where the working precision is lower.
    optimizer = 8 if recipe.model.dtype == "float32" else 12
    tokens = recipe.schedule.batch_tokens
    accelerator = get_accelerator(recipe.cluster.accelerator)
    peak = accelerator.peak(recipe.model.dtype).flops
    utilisation = UTILISATION[accelerator.name]
    flops = model["flops_per_token"] * tokens
    return Estimate(
        parameters=parameters,
        tokens_per_step=tokens,
        steps=recipe.schedule.steps,
        flops_per_step=flops,
        weights_gib=parameters * working / GIB,
        gradients_gib=parameters * working / GIB,
        optimizer_gib=parameters * optimizer / shards / GIB,
        peak_flops=peak,
        utilisation=utilisation,
        step_seconds=flops / (peak * ranks * utilisation) if peak else None,
    )
