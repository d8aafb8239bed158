"""Pairs with what the reference thinks of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lab_utils.data.rows import PackedRows
from lab_utils.engine.feeds import Feed
from lab_utils.engine.frozen import frozen
from lab_utils.engine.reduce import over_ranks
from lab_utils.engine.reference import reference_logps
from lab_utils.telemetry.reductions import reduce_metrics


class PreferenceFeed(Feed):
    """Pairs; ``reference_logps`` from the cache or of a live model, and kto's estimate of the KL."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        section = engine.recipe.objective
        source = section.reference_source or engine.recipe.model.source
        self.live = None
        if section.needs_reference and section.reference == "live":
            self.live = frozen(source, engine.recipe, engine.layout, engine.device)
        elif section.needs_reference:
            loaders = [each for each in (self.train, self.validation) if each is not None]
            found = reference_logps(source, loaders, engine, engine.tell)
            for loader, logps in zip(loaders, found, strict=True):
                loader.reference = logps
        self.statistics = section.loss == "kto"

    def complete(self, micro: list[PackedRows]) -> list[PackedRows]:
        if self.live is not None:
            logps = self.live.token_logps(micro)
            micro = [_with(rows, reference_logps=each) for rows, each in zip(micro, logps, strict=True)]
        if self.statistics:
            z0 = self._kl(micro)
            micro = [
                _with(rows, z0=torch.full((rows.rows, 1), z0, device=rows.input_ids.device)) for rows in micro
            ]
        return micro

    def _kl(self, micro: list[PackedRows]) -> float:
        """The mean log-ratio of mismatched answers over the global batch, by the current weights (KTO, eq. 8)."""
        passes = self.engine.passes

        def of(output: Any, rows: PackedRows) -> dict[str, Any]:
            return passes.parts.objective.statistics(output.hidden_BTD, passes.raw.head_weight, rows)

        found = over_ranks(reduce_metrics(passes.read(micro, of)), self.engine.device)
        return found["z0"].value if not found["z0"].empty else 0.0


def _with(rows: PackedRows, **side: torch.Tensor) -> PackedRows:
    return replace(rows, side={**rows.side, **side})


FEED = PreferenceFeed
