"""What a run's own records say of its course: attempts, time, tokens, speed, utilisation, energy, curves, events."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from lab_utils.runs.directory import RunDirectory

Rows = list[dict[str, Any]]
Steps = dict[int, dict[str, Any]]

# Events of every healthy run; anything else is worth a line in the card.
ROUTINE = frozenset({"checkpoint", "resumed", "note", "stop_requested", "skipped_step"})
MAX_POINTS = 400  # of a curve
MAX_ALERTS = 20
CHIP_BYTES = 2**28  # samples beyond this are not read again as a run ends, only by `lab card`


def number(value: Any) -> float | None:
    """A finite number, also from the text that stands for NaN in JSON; None for anything else."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


# -- time ----------------------------------------------------------------------------------------------------


def attempts(run: RunDirectory, rows: Rows, events: Rows, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each start or resume of the run: ``started``, ``ended`` (the last sign of life before the next), ``seconds``.

    A worker that left ``facts.json`` said when it began. Where there is none, a run begins with its status and again
    with each event ``resumed``.
    """
    status = run.status
    signs = [
        t
        for row in (*rows, *events)
        if row.get("kind") != "stop_requested" and (t := number(row.get("time")))
    ]
    starts = [t for each in facts.get("attempts") or [] if (t := number(each.get("opened")))]
    if not starts:
        again = [t for row in events if row.get("kind") == "resumed" and (t := number(row.get("time")))]
        first = [t for t in (number(status.get("started")), *signs) if t]
        starts = sorted({*([min(first)] if first else []), *again})
    last = number(status.get("finished")) or number(status.get("heartbeat"))
    found = []
    for index, start in enumerate(starts):
        following = starts[index + 1] if index + 1 < len(starts) else None
        within = [t for t in (*signs, last or 0.0) if t >= start and (following is None or t < following)]
        # The supervisor's word on the end counts for the last attempt alone, whatever was still written after it.
        end = last if following is None and last and last >= start else max(within, default=start)
        found.append({"started": start, "ended": end, "seconds": round(end - start, 3)})
    return found


def wall_clock(found: list[dict[str, Any]]) -> float | None:
    """Seconds over all attempts, pauses between them left out."""
    return round(sum(each["seconds"] for each in found), 3) if found else None


# -- speed ---------------------------------------------------------------------------------------------------


def weights(steps: Steps) -> dict[int, int]:
    """How many optimizer steps each logged line of training stands for."""
    found, before = {}, 0
    for step in sorted(steps):
        if number(steps[step].get("perf/step_time")) is not None:
            found[step], before = step - before, step
    return found


def _weighted(steps: Steps, by: dict[int, float], key: str) -> float | None:
    pairs = [(value, by[s]) for s in by if (value := number(steps[s].get(key))) is not None]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _median(steps: Steps, key: str) -> float | None:
    values = [value for row in steps.values() if (value := number(row.get(key))) is not None]
    return statistics.median(values) if values else None


def throughput(steps: Steps, seconds: float | None) -> dict[str, Any]:
    """Rates as means over the time in steps (tokens over seconds) and as medians over logged lines.

    Args:
        seconds: wall clock, for the rate from start to end, evaluation and saving included.
    """
    by = weights(steps)
    times = {s: n * float(steps[s]["perf/step_time"]) for s, n in by.items()}
    in_steps = sum(times.values())
    split = {
        key.removeprefix("perf/time/"): part
        for key in sorted({k for row in steps.values() for k in row if k.startswith("perf/time/")})
        if (part := _weighted(steps, by, key)) is not None
    }
    whole = _weighted(steps, by, "perf/step_time")
    tokens = last(steps, "train/num_tokens")
    mean = {
        key: _weighted(steps, times, f"perf/{key}")
        for key in ("tokens_per_s", "tokens_per_s_per_chip", "tflops_per_chip", "mfu", "padding_frac")
    }
    return {
        "mean": mean,
        "median": {key: _median(steps, f"perf/{key}") for key in mean},
        "step_time_s": {"mean": whole, "median": _median(steps, "perf/step_time")},
        "seconds_in_steps": in_steps or None,
        "end_to_end_tokens_per_s": tokens / seconds if tokens and seconds else None,
        "time_split": {key: part / whole for key, part in split.items()} if whole else {},
    }


def last(steps: Steps, key: str) -> float | None:
    """The newest logged value of a metric."""
    return next(
        (v for s in sorted(steps, reverse=True) if (v := number(steps[s].get(key))) is not None), None
    )


def utilisation(steps: Steps) -> dict[str, Any]:
    """Of the chips, from what was logged with the steps; None where nothing was."""

    def over(key: str, how: Callable[[Iterable[float]], float]) -> float | None:
        values = [value for row in steps.values() if (value := number(row.get(key))) is not None]
        return how(values) if values else None

    return {
        "util_mean_percent": over("chip/util_mean", statistics.fmean),
        "util_min_percent": over("chip/util_min", min),
        "memory_peak_frac": over("chip/hbm_frac", max),
        "allocated_peak_gib": over("mem/allocated_peak", max),
        "power_mean_w": over("chip/power", statistics.fmean),
        "temp_max_c": over("chip/temp_max", max),
    }


def energy(run: RunDirectory, tokens: float | None, brief: bool) -> dict[str, Any] | None:
    """Energy of the chips over the whole run; None where no chip reports its power.

    Args:
        tokens: trained on, for joules per token.
        brief: the end of a run must not wait for gigabytes of samples: then the nodes' own running sums are taken.
    """
    from lab_utils.telemetry import chip_log

    if brief and sum(file.stat().st_size for file in chip_log.node_files(run.path)) > CHIP_BYTES:
        nodes = chip_log.newest(run.path).values()
        spent = [joules for row in nodes if (joules := number(row.get("joules"))) is not None]
        kwh = sum(spent) / chip_log.JOULES_PER_KWH if spent else None
        told = {"chips": sum(len(row.get("chips") or ()) for row in nodes)}
    else:
        found = chip_log.energy(run.path)
        kwh = number(found.kwh)
        told = {key: getattr(found, key) for key in ("watts_mean", "chips", "seconds", "covered")}
    if kwh is None:
        return None
    return {
        "kwh": kwh,
        **told,
        "joules_per_token": kwh * chip_log.JOULES_PER_KWH / tokens if tokens else None,
    }


# -- curves and events ---------------------------------------------------------------------------------------


def curves(steps: Steps, keys: Iterable[str]) -> dict[str, list[list[float]]]:
    """``[[step, value], …]`` of each metric that was logged; long ones as the means of equal runs of steps."""
    found = {}
    for key in keys:
        points = [[s, v] for s in sorted(steps) if (v := number(steps[s].get(key))) is not None]
        if points:
            found[key] = _thinned(points)
    return found


def _thinned(points: list[list[float]]) -> list[list[float]]:
    if len(points) <= MAX_POINTS:
        return points
    cuts = [round(i * len(points) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    bins = [points[a:b] for a, b in pairwise(cuts)]
    return [[part[-1][0], statistics.fmean(v for _, v in part)] for part in bins]


def tenths(steps: Steps, keys: tuple[str, ...], total: int) -> Rows:
    """Values at 0, 10, …, 100 % of the steps done: of each metric the line next to it, none beyond a twentieth."""
    found = []
    for tenth in range(11):
        aim = max(total * tenth / 10, 1)
        row: dict[str, Any] = {"percent": 10 * tenth, "step": None}
        for key in keys:
            near = [
                s
                for s in steps
                if abs(s - aim) <= max(total / 20, 1) and number(steps[s].get(key)) is not None
            ]
            if near:
                step = min(near, key=lambda s: (abs(s - aim), s))
                row[key], row["step"] = number(steps[step][key]), row["step"] or step
        if row["step"] is not None and (not found or row["step"] != found[-1]["step"]):
            found.append(row)
    return found


def stability(steps: Steps, rows: Rows, events: Rows) -> dict[str, Any]:
    """What didn't go smoothly: skipped steps, steps done twice, alerts."""
    counts = Counter(str(row.get("kind")) for row in events)
    odd = [row for row in events if row.get("kind") not in ROUTINE]
    trained = sum("perf/step_time" in row for row in rows)
    return {
        "skipped_steps": last(steps, "train/skipped_steps"),
        "lines_repeated_after_resumes": trained - len(weights(steps)),
        "checkpoints": counts["checkpoint"],
        "alerts": [
            {"time": number(row.get("time")), "kind": row.get("kind"), "message": row.get("message")}
            for row in odd[-MAX_ALERTS:]
        ],
        "alert_count": len(odd),
    }
