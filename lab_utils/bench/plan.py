"""The planner beside runs of this machine's cores: seconds of a step, tensors at its fullest moment, the process.

The machine is measured first (``planner/measure.py``). From there on memory is predicted, and seconds from two steps
that take turns with those of the run, in one job: a machine that is shared is half as fast again at one time as at
another, and within a minute. What is written joins ``docs/calibration.md`` from ``planner/own``.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import yaml

from lab_utils.bench.layouts import bench_layout, seconds_of
from lab_utils.planner.fitted import fitted, fitted_on
from lab_utils.planner.layouts import layout_names
from lab_utils.planner.measure import measure, tree_of
from lab_utils.planner.own import predicted

# Model, rows of a rank, tokens of a row.
SIZES = (("preset:reference", 4, 1024), ("preset:reference", 8, 256), ("preset:tiny", 16, 512))
LAYOUTS = ("ep1_pp1", "cp2_ep1_pp1", "ep2_pp1", "ep1_pp2", "ep1_pp2_v2")


def bench_plan(ranks: int, steps: int, on_row: Any = None) -> dict[str, Any]:
    """``machine``, ``cluster`` (its YAML) and ``runs``: rows of ``source``, ``rows``, ``row_tokens``, ``layout``,
    ``seconds``, ``beside`` (of the two steps, by the order of ``FITTED_ON``), ``tensors_mib``, ``peak_mib``, and under
    ``predicted`` what of these is."""
    from lab_utils.accelerators.cpu import Cpu

    found = measure()
    cluster = fitted(tree_of(found), found["steps"])
    machine = f"{found['cores']} cores of {Cpu().device_name()}, {date.today().isoformat()}"
    runs = []
    for source, rows, row_tokens in SIZES:
        size = {"source": source, "rows": rows * ranks, "row_tokens": row_tokens}
        for name in _of(ranks):
            run = {**size, "ranks": ranks, "layout": name}
            *beside, seconds = seconds_of(ranks, [*fitted_on(ranks), run], steps)
            run |= {"seconds": round(seconds, 4), "beside": [round(each, 4) for each in beside]}
            (row,) = bench_layout(ranks, layouts=[name], steps=3, accelerator="cpu", follow=True, **size)
            run |= {key: round(row[key], 1) for key in ("tensors_mib", "peak_mib")}
            runs.append({**run, "predicted": predicted(cluster, run)})
            if on_row:
                on_row(runs[-1])
    return {"machine": machine, "cluster": cluster, "runs": runs}


def _of(ranks: int) -> list[str]:
    """The layouts of ``LAYOUTS`` that so many ranks allow, by their whole names."""
    known = layout_names(ranks)
    return [name for end in LAYOUTS for name in known if name.partition("_")[2] == end]


def write(found: dict[str, Any], path: Path) -> None:
    """What was measured, without what is predicted from it."""
    runs = [{key: value for key, value in run.items() if key != "predicted"} for run in found["runs"]]
    path.write_text(
        yaml.safe_dump({**found, "runs": runs}, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
