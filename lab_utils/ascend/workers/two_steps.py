"""Two steps of the real engine on one device: ``python -m lab_utils.ascend.workers.two_steps OPTIONS.json``.

Weights of the shipped model ``tiny``, synthetic rows, fp32 on every device: the same job but for where it computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab_utils.ascend.workers import answer

STEPS = 2


def main(options: dict[str, Any]) -> dict[str, Any]:
    """``losses`` and ``norms`` of the steps, and ``weights``: L2 norm of each parameter after them."""
    from lab_utils.accelerators import get_accelerator
    from lab_utils.engine import colossal
    from lab_utils.engine.control import Stop
    from lab_utils.engine.engine import Engine
    from lab_utils.engine.trial import build_trial, trial_recipe
    from lab_utils.runs.directory import RunDirectory

    accelerator = get_accelerator(options["device"])
    colossal.start(accelerator, 0)
    recipe = trial_recipe("base:tiny", {"schedule.steps": STEPS, "cluster.accelerator": options["device"]})
    folder = Path(options["folder"])
    folder.mkdir(parents=True)
    RunDirectory(folder).write_status(state="created")
    engine = Engine(recipe, accelerator, RunDirectory(folder), build_trial)
    engine.open()
    losses, norms = [], []
    for _ in range(STEPS):
        metrics = engine.forward_backward(engine.load(Stop.NO))
        losses.append(float(metrics["train/loss"].total) / float(metrics["train/loss"].count))
        engine.update(metrics)
        norms.append(engine.norm)
    weights = {name: float(x.detach().float().norm()) for name, x in engine.parts.model.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


if __name__ == "__main__":
    answer(main)
