"""Learning rates as pure functions of the step: a resumed run continues exactly, with no state to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

from lab_utils.recipe import ScheduleSection

Shape = Callable[[float, ScheduleSection], float]


def learning_rate(step: int, schedule: ScheduleSection, peak: float) -> float:
    """Rate of optimizer step ``step`` (0 is the first).

    Linear warm-up reaches ``peak`` in step ``warmup_steps - 1``; the shape then runs over the remaining steps and
    arrives at ``final_lr_ratio · peak`` in the last one (``constant`` stays at the peak).
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    done = (step + 1 - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    return peak * SHAPES[schedule.shape](min(1.0, done), schedule)


def cosine(done: float, schedule: ScheduleSection) -> float:
    """Half a cosine from 1 to ``final_lr_ratio`` (SGDR, arXiv 1608.03983, one cycle)."""
    low = schedule.final_lr_ratio
    return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * done))


def wsd(done: float, schedule: ScheduleSection) -> float:
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): 1, then linear to ``final_lr_ratio`` in the last part.

    ``decay_fraction`` counts from all steps, so the decay starts at the same step whatever the warm-up.
    """
    after_warmup = max(1, schedule.steps - schedule.warmup_steps) / schedule.steps
    share = min(1.0, schedule.decay_fraction / after_warmup)
    into = max(0.0, (done - (1.0 - share)) / share)
    return 1.0 - (1.0 - schedule.final_lr_ratio) * into


def constant(done: float, schedule: ScheduleSection) -> float:
    return 1.0


SHAPES: dict[str, Shape] = {"cosine": cosine, "wsd": wsd, "constant": constant}
