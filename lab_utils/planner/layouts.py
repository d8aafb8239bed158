"""Names of the layouts that a number of ranks allows."""

from __future__ import annotations

from typing import Any


def layout_names(world: int) -> dict[str, dict[str, Any]]:
    """Changes of a recipe for each layout of so many ranks: ep and pp of 1, 2 and 4, plain (1F1B) and interleaved."""
    found: dict[str, dict[str, Any]] = {}
    for pp in (1, 2, 4):
        for ep in (1, 2, 4):
            if world % pp or (world // pp) % ep:
                continue
            name = f"dp{world // pp}_ep{ep}_pp{pp}"
            found[name] = {"parallel.ep": ep, "parallel.pp": pp}
            if pp > 1:
                found[f"{name}_v2"] = {**found[name], "parallel.virtual_stages": 2}
    return found
