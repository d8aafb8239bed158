"""Who samples for a run: the trained model itself, or a server that is handed its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab_utils.engine.reduce import MAX, all_reduce, from_first_stage


def make_sampler(engine: Any, folder: Path) -> Any:
    """The sampler of ``recipe.rollout``."""
    rollout, layout = engine.recipe.rollout, engine.layout
    encoding = engine.parts.encoding
    if rollout.source == "server":
        from lab_utils.rollouts.server import Server

        return Server(
            rollout.server,
            encoding,
            folder,
            rank=layout.dp_rank,
            model=rollout.server_model,
            reload=rollout.reload,
        )
    from lab_utils.rollouts.in_process import InProcess

    return InProcess(
        engine.parts.model,
        encoding,
        folder,
        rank=layout.dp_rank,
        slots=rollout.slots,
        want_routing=getattr(engine.recipe.objective, "keep_routing", False),
        lockstep=lockstep(engine),
        share=lambda value: from_first_stage(value, layout),
        logs=layout.first_stage,
    )


def lockstep(engine: Any) -> Any:
    """How ranks that share experts take the steps of ``generate`` together; None where none do."""
    if engine.layout.ep_size == 1:
        return None

    def agree(passes: bool, samples: bool) -> tuple[bool, bool]:
        found = all_reduce([float(passes), float(samples)], engine.device, MAX)
        return bool(found[0]), bool(found[1])

    return agree
