"""Names of the layouts that a number of ranks allows."""

from __future__ import annotations

from typing import Any

# Beside each degree alone: rows cut over ranks together with experts, stages and both.
WITH_CP = {(2, 1, 1), (4, 1, 1), (2, 4, 1), (2, 2, 2), (4, 2, 2), (2, 1, 4)}


def layout_names(world: int) -> dict[str, dict[str, Any]]:
    """Changes of a recipe for each layout of so many ranks: ep and pp of 1, 2 and 4, plain (1F1B) and interleaved, and
    cp of 2 and 4 in some of them."""
    found: dict[str, dict[str, Any]] = {}
    for cp in (1, 2, 4):
        for pp in (1, 2, 4):
            for ep in (1, 2, 4):
                if (cp > 1 and (cp, ep, pp) not in WITH_CP) or world % (pp * cp) or (world // pp) % ep:
                    continue
                cut = f"_cp{cp}" if cp > 1 else ""
                name = f"dp{world // pp // cp}{cut}_ep{ep}_pp{pp}"
                found[name] = {"parallel.ep": ep, "parallel.pp": pp}
                if cp > 1:
                    found[name]["parallel.cp"] = cp
                if pp > 1:
                    found[f"{name}_v2"] = {**found[name], "parallel.virtual_stages": 2}
    return found
