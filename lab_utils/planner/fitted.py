"""What this machine's steps say of its figures: two small models, data-parallel, beside what is counted for them.

Products in a step are slower than square ones by themselves, and on a CPU calling an operator costs what a small one
takes. Two steps give the two numbers: the share of the measured rates that a step sustains, and the time of a layer's
calls. The same runs say what a process holds without tensors, and what its heap holds beyond them. All other layouts,
lengths and models are predicted from there (``docs/calibration.md``).
"""

from __future__ import annotations

from typing import Any

from lab_utils.recipe import Recipe

# Model, rows of a rank, tokens of a row: one step in which the work counts, one in which the calls do.
FITTED_ON = (("preset:reference", 4, 1024), ("preset:tiny", 2, 128))


def bench_recipe(source: str, rows: int, row_tokens: int, changes: dict[str, Any]) -> Recipe:
    """The recipe of ``lab bench layout``: fp32 and AdamW on CPUs, but for ``changes``."""
    tree = {
        "name": "bench",
        "model": {"source": source, "dtype": "float32"},
        "data": {"train": [{"manifest": "none"}], "row_tokens": row_tokens},
        "optim": {"kind": "adamw"},
        "schedule": {"steps": 1000, "batch_tokens": rows * row_tokens},
        "cluster": {"accelerator": "cpu"},
        "tracking": {"wandb": "disabled"},
    }
    return Recipe.parse(tree).with_changes(changes)


def steps(ranks: int) -> list[dict[str, Any]]:
    """Measured: ``source``, ``rows`` (of all ranks), ``row_tokens``, ``layout``, ``ranks``, ``seconds`` of a step,
    ``peak_mib`` and ``resident_mib``."""
    from lab_utils.bench.layouts import bench_layout

    found = []
    for run in fitted_on(ranks):
        size = {key: run[key] for key in ("source", "rows", "row_tokens")}
        (row,) = bench_layout(ranks, layouts=[run["layout"]], steps=7, accelerator="cpu", **size)
        found.append({**row, **run, "seconds": run["rows"] * run["row_tokens"] / row["tokens_per_s"]})
    return found


def fitted_on(ranks: int) -> list[dict[str, Any]]:
    """``source``, ``rows`` (of all ranks), ``row_tokens``, ``layout`` and ``ranks`` of the two steps."""
    layout = {"layout": f"dp{ranks}_ep1_pp1", "ranks": ranks}
    return [
        {"source": source, "rows": rows * ranks, "row_tokens": row_tokens, **layout}
        for source, rows, row_tokens in FITTED_ON
    ]


def fitted(tree: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """A cluster's YAML with the figures that steps give; as it was, where none were measured."""
    from lab_utils.planner.memory import stage_memory

    if not measured:
        return tree
    large, small = (
        1024 * max(stage.seen_by_twin for stage in stage_memory(recipe_of(step), step["ranks"]))
        for step in measured
    )
    grown = measured[0]["peak_mib"] - measured[1]["peak_mib"]
    heap = max(0.0, grown / (large - small) - 1.0)
    runtime = max(measured[1]["resident_mib"], measured[1]["peak_mib"] - (1 + heap) * small) / 1024
    process = "measured: what a rank's process holds without tensors, from steps of reference and tiny"
    of_heap = (
        "measured: what more tensors take of a process, beyond themselves, from steps of reference and tiny"
    )
    tree = sustained(tree, measured)
    tree["runtime_gib"] = {"value": float(f"{runtime:.4g}"), "source": process}
    tree["allocator_share"] = {"value": float(f"{heap:.3g}"), "source": of_heap}
    return tree


def sustained(tree: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """A cluster's YAML with the share of its rates and the time of calls at which two steps take what they took."""
    share = _share(tree, measured)
    seconds, layers = _predicted(tree, share, measured[1])
    calls = max(0.0, (measured[1]["seconds"] - seconds) / layers)
    source = "measured: steps of reference and tiny, data-parallel over the cores, beside their counts"
    tree = _with_share(tree, share, source)
    tree["layer_calls_us"] = {"value": float(f"{calls * 1e6:.4g}"), "source": source}
    return tree


def _share(tree: dict[str, Any], measured: list[dict[str, Any]]) -> float:
    """The share of the rates at which both steps leave the same time for the calls of a layer."""

    def calls(share: float) -> list[float]:
        found = []
        for step in measured:
            seconds, layers = _predicted(tree, share, step)
            found.append((step["seconds"] - seconds) / layers)
        return found

    low, high = 0.02, 1.0
    if (of_large := calls(high))[0] <= of_large[1]:  # even at the full rates the large step isn't too fast
        return high
    for _ in range(40):
        share = (low * high) ** 0.5
        large, small = calls(share)
        low, high = (low, share) if large > small else (share, high)
    return float(f"{high:.3g}")


def _predicted(tree: dict[str, Any], share: float, step: dict[str, Any]) -> tuple[float, int]:
    """Seconds of a step at a share of the rates, without calls; and how many passes of layers it makes."""
    from lab_utils.planner.assumptions import Assumptions
    from lab_utils.planner.cluster import Cluster
    from lab_utils.planner.search import evaluate

    silent = {key: value for key, value in tree.items() if key != "layer_calls_us"}
    cluster = Cluster.model_validate(_with_share(silent, share, "tried"))
    found = evaluate(recipe_of(step), cluster, step["ranks"], Assumptions(imbalance=1.0))
    return found.time.seconds, found.placed.passes * found.placed.numbers.num_hidden_layers


def _with_share(tree: dict[str, Any], share: float, source: str) -> dict[str, Any]:
    figure = {"value": share, "source": source}
    return {**tree, "efficiency": {**tree["efficiency"], "sustained": figure, "memory": figure}}


def recipe_of(step: dict[str, Any], changes: dict[str, Any] | None = None) -> Recipe:
    return bench_recipe(step["source"], step["rows"], step["row_tokens"], changes or {})
