"""Training without an end on all devices of a node, with the chips read beside: ``… burn_in OPTIONS.json``.

The engine as a run has it, on the shipped model ``tiny`` and synthetic rows; the rows come round again, so that the
loss must fall.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from lab_utils.ascend.workers import answer

ROUND = 8  # batches that come again and again
CHIP_SECONDS = 2.0


def main(options: dict[str, Any]) -> dict[str, Any]:
    """``steps``, ``first`` and ``last`` loss (means over a round), ``finite``, ``seconds``, ``tokens_per_s``, and
    ``chips``: largest values of the ``chip/`` metrics."""
    import torch.distributed as dist

    from lab_utils.accelerators import get_accelerator
    from lab_utils.engine import colossal
    from lab_utils.engine.control import Stop
    from lab_utils.engine.engine import Engine
    from lab_utils.engine.reduce import over_ranks
    from lab_utils.engine.trial import ROWS, TOKENS, build_trial, trial_recipe
    from lab_utils.runs.directory import RunDirectory
    from lab_utils.telemetry.chips import ChipSampler
    from lab_utils.telemetry.reductions import to_values

    accelerator = get_accelerator(options["device"])
    rank, ranks = colossal.start(accelerator, 0)
    experts = 2 if ranks % 2 == 0 else 1  # the all-to-all takes part
    changes = {
        "cluster.accelerator": options["device"],
        "cluster.nproc": ranks,
        "parallel.ep": experts,
        "schedule.steps": 10**9,
        "schedule.shape": "constant",
        "optim.lr": 1e-3,
    }
    folder = Path(options["folder"])
    if rank == 0:
        folder.mkdir(parents=True)
        RunDirectory(folder).write_status(state="created")
    dist.barrier()
    engine = Engine(trial_recipe("base:tiny", changes), accelerator, RunDirectory(folder), build_trial)
    engine.open()
    sampler = ChipSampler(options["device"], CHIP_SECONDS, folder, chips=ranks) if rank == 0 else None
    losses: list[float] = []
    highest: dict[str, float] = {}
    if sampler:
        sampler.start()
    began = time.perf_counter()
    while True:
        batch = engine.progress.step % ROUND
        engine.parts.train.load_state_dict({"step": batch + 1})
        metrics = engine.forward_backward(engine.load(Stop.NO))
        loss = over_ranks({"train/loss": metrics["train/loss"]}, engine.device)
        losses.append(to_values(loss)["train/loss"])
        engine.update(metrics)
        for name, value in (sampler.latest() if sampler else {}).items():
            highest[name] = max(value, highest.get(name, -math.inf))
        spent = [time.perf_counter() - began]
        dist.broadcast_object_list(spent, 0)  # all stop at the same step
        if spent[0] >= options["seconds"] and len(losses) >= 2 * ROUND:
            break
    if sampler:
        sampler.stop()
    seconds = time.perf_counter() - began
    return {
        "steps": len(losses),
        "first": sum(losses[:ROUND]) / ROUND,
        "last": sum(losses[-ROUND:]) / ROUND,
        "finite": all(map(math.isfinite, losses)) and engine.progress.skipped == 0,
        "seconds": seconds,
        "tokens_per_s": len(losses) * ROWS * TOKENS / seconds,
        "chips": highest,
    }


if __name__ == "__main__":
    answer(main)
