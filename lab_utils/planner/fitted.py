"""What this machine's steps say of its figures: two small models, data-parallel, beside what is counted for them.

Products in a step are slower than square ones by themselves, and on a CPU calling an operator costs what a small one
takes. Two steps give the two numbers: the share of the measured rates that a step sustains, and the time of a layer's
calls. The same run says what a process holds before there is a model, and what the heap holds beyond the tensors. All
other layouts, lengths and models are predicted from there (``docs/calibration.md``).
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
    """Measured: ``source``, ``rows`` (of all ranks), ``row_tokens``, ``ranks``, ``seconds`` of a step, ``peak_mib``
    and ``resident_mib``."""
    from lab_utils.bench.layouts import bench_layout

    found = []
    for source, rows, row_tokens in FITTED_ON:
        size = {"source": source, "rows": rows * ranks, "row_tokens": row_tokens}
        name = f"dp{ranks}_ep1_pp1"
        (row,) = bench_layout(ranks, layouts=[name], steps=7, accelerator="cpu", **size)
        seconds = rows * ranks * row_tokens / row.pop("tokens_per_s")
        found.append({**size, "ranks": ranks, "seconds": seconds, **row})
    return found


def fitted(tree: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """A cluster's YAML with the figures that steps give; as it was, where none were measured."""
    from lab_utils.planner.memory import stage_memory

    if not measured:
        return tree
    share = _share(tree, measured)
    seconds, calls = _predicted(tree, share, measured[1])
    first = measured[0]
    tensors = 1024 * max(stage.seen_by_twin for stage in stage_memory(recipe_of(first), first["ranks"]))
    found = {
        "calls": max(0.0, (measured[1]["seconds"] - seconds) / calls),
        "heap": max(0.0, (first["peak_mib"] - first["resident_mib"]) / tensors - 1.0),
        "runtime": first["resident_mib"] / 1024,
    }
    source = "measured: steps of reference and tiny, data-parallel over the cores, beside their counts"
    process = "measured: a rank that has joined the others, before there is a model"
    heap = "measured: what a rank's process holds beyond its tensors in a step of reference"
    tree = _with_share(tree, share, source)
    tree["layer_calls_us"] = {"value": float(f"{found['calls'] * 1e6:.4g}"), "source": source}
    tree["runtime_gib"] = {"value": float(f"{found['runtime']:.4g}"), "source": process}
    tree["allocator_share"] = {"value": float(f"{found['heap']:.3g}"), "source": heap}
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

    cluster = Cluster.model_validate(_with_share(tree, share, "tried"))
    found = evaluate(recipe_of(step), cluster, step["ranks"], Assumptions(imbalance=1.0))
    return found.time.seconds, found.placed.passes * found.placed.numbers.num_hidden_layers


def _with_share(tree: dict[str, Any], share: float, source: str) -> dict[str, Any]:
    figure = {"value": share, "source": source}
    return {**tree, "efficiency": {**tree["efficiency"], "sustained": figure, "memory": figure}}


def recipe_of(step: dict[str, Any], changes: dict[str, Any] | None = None) -> Recipe:
    return bench_recipe(step["source"], step["rows"], step["row_tokens"], changes or {})
