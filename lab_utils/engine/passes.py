"""Forward and backward passes of one rank over the micro-batches of a step, plain or through the stages of a pipeline.

What a loss is divided by is known before (``Shares``): so micro-batches, ranks and stages only ever add up.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from lab_utils.data.rows import PackedRows
from lab_utils.models.base import RoutingRecord
from lab_utils.telemetry.reductions import Mean, Metric, reduce_metrics


@dataclass(frozen=True)
class Shares:
    """Counts of the global batch: of the objective's loss, of tokens, of each auxiliary loss by name."""

    loss: float = 1.0
    tokens: float = 1.0
    auxiliary: dict[str, float] = field(default_factory=dict)


class Passes:
    """The model and its objective, run over rows.

    Args:
        parts: of this rank.
        booster, model, optimizer: as ColossalAI wrapped them.
        layout: the plugin; says whether there are stages.
    """

    def __init__(self, parts: Any, booster: Any, model: Any, optimizer: Any, layout: Any) -> None:
        self.parts, self.booster, self.model, self.optimizer, self.layout = (
            parts,
            booster,
            model,
            optimizer,
            layout,
        )
        # A model with auxiliary losses of its own tells their counts, and weighs tokens as the objective does.
        self._counts_of = getattr(parts.model, "auxiliary_counts", None)

    def auxiliary_counts(self, micro: list[PackedRows]) -> dict[str, float]:
        """What this rank's auxiliary losses will be over, by name, where the model can tell before its forward pass."""
        if self._counts_of is None:
            return {}
        parts = [self._counts_of(m.position_ids, m.document_ids, m.loss_weights) for m in micro]
        return {name: float(sum(part[name] for part in parts)) for name in sorted(parts[0])}

    def train(self, micro: list[PackedRows], shares: Shares) -> dict[str, Metric]:
        """Gradients of the mean loss over the global batch: summed over micro-batches here, over ranks at the end."""
        found: list[dict[str, Metric]] = []
        if self.layout.pp_size > 1:
            self._through_stages(micro, shares, found, self.optimizer)
            return reduce_metrics(found)
        for i, rows in enumerate(micro):
            last = i == len(micro) - 1
            with nullcontext() if last else self.optimizer.no_sync():
                loss, metrics = self.loss(rows, shares)
                self.booster.backward(loss, self.optimizer)
            found.append(metrics)
        return reduce_metrics(found)

    def loss(self, rows: PackedRows, shares: Shares) -> tuple[torch.Tensor, dict[str, Metric]]:
        """This micro-batch's share of the global batch's loss, and its metrics."""
        options = {} if self._counts_of is None else {"loss_weights": rows.loss_weights}
        if "routing" in rows.side:
            options["routing"] = RoutingRecord.from_rows(rows.side["routing"])
        output = self.model(rows.input_ids, rows.position_ids, rows.document_ids, **options)
        return self._total(output, rows, shares)

    def look(self, batches: list[PackedRows]) -> list[dict[str, Metric]]:
        """The objective's loss and metrics on each of these micro-batches, without gradients."""
        found: list[dict[str, Metric]] = []
        stages = self.layout.pp_size
        if stages == 1:
            for rows in batches:
                output = self.model(rows.input_ids, rows.position_ids, rows.document_ids)
                found.append(self._objective(output, rows, Shares())[1])
            return found
        height = batches[0].rows
        for i in range(0, len(batches), stages):
            # A schedule wants as many micro-batches as stages, all of one height: rows of padding fill up.
            some = PackedRows.joined(batches[i : i + stages]).with_rows(stages * height)
            micro = [some.slice(j, j + height) for j in range(0, some.rows, height)]
            self._through_stages(micro, Shares(), found, None)
        return found

    def _total(self, output: Any, rows: PackedRows, shares: Shares) -> tuple[torch.Tensor, dict[str, Metric]]:
        """The objective's loss plus the auxiliary ones of an output.

        An auxiliary loss is a mean over its own count. A model without ``auxiliary_counts`` cannot say what that will
        be in micro-batches to come: then it is taken to be proportional to their tokens.
        """
        loss, metrics = self._objective(output, rows, shares)
        for name, aux in output.auxiliary.items():
            known = shares.auxiliary.get(name)
            share = (
                1.0 / max(known, 1.0)
                if known is not None
                else (rows.tokens / shares.tokens / torch.as_tensor(aux.count).clamp(min=1.0))
            )
            loss = loss + aux.weight * share * aux.total
            metrics[f"train/{name}"] = Mean(aux.total.detach(), aux.count)
        return loss, metrics

    def _objective(
        self, output: Any, rows: PackedRows, shares: Shares
    ) -> tuple[torch.Tensor, dict[str, Metric]]:
        result = self.parts.objective(output.hidden_BTD, self.parts.model.head_weight, rows)
        metrics: dict[str, Metric] = {"train/loss": Mean(result.loss.total.detach(), result.loss.count)}
        metrics |= {f"train/{leaf}": metric for leaf, metric in result.metrics.items()}
        metrics |= {key if "/" in key else f"train/{key}": metric for key, metric in output.metrics.items()}
        return result.loss.total / shares.loss, metrics

    def _through_stages(
        self, micro: list[PackedRows], shares: Shares, found: list[dict[str, Metric]], optimizer: Any
    ) -> None:
        """Micro-batches through the pipeline; metrics arise on the last stage, auxiliary ones where their layer is."""
        stage = self.parts.model.stage
        stage.counts = shares.auxiliary

        def criterion(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            loss, metrics = self._total(output, PackedRows.from_tensors(batch), shares)
            found.append(metrics)
            return loss * len(micro)  # the schedule divides by their number

        tensors = PackedRows.joined(micro).tensors()
        self.layout.run_pipeline(tensors, self.model, criterion, optimizer)
        for name, aux in stage.take():
            found.append({f"train/{name}": Mean(aux.total, aux.count)})
