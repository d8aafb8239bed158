"""Forward and backward passes of one rank over the micro-batches of a step, plain or through the stages of a pipeline.

What a loss is divided by is known before (``Shares``): so micro-batches, ranks and stages only ever add up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lab_utils.data.rows import PackedRows
from lab_utils.models.base import RoutingRecord
from lab_utils.models.context_parallel import ContextParallel
from lab_utils.objectives._kept import policy_logps
from lab_utils.telemetry.reductions import Mean, Metric, reduce_metrics

Found = TypeVar("Found")


@dataclass(frozen=True)
class Shares:
    """Counts of the global batch: of the objective's loss, of tokens, of each auxiliary loss by name."""

    loss: float = 1.0
    tokens: float = 1.0
    auxiliary: dict[str, float] = field(default_factory=dict)


class Reader:
    """A model as a layout cut it, run over rows without gradients.

    Args:
        model: our own, as it was cut; ``wrapped``: as ColossalAI wrapped it.
        layout: the plugin; says whether there are stages.
    """

    def __init__(self, model: Any, wrapped: Any, layout: Any) -> None:
        self.raw, self.model, self.layout = model, wrapped, layout

    @torch.no_grad()
    def read(self, batches: list[PackedRows], what: Callable[[Any, PackedRows], Found]) -> list[Found]:
        """``what(output, rows)`` of each of these micro-batches; on the last stage of a pipeline, else nothing. There,
        rows may be followed by rows of padding.

        Every rank of an ep group must come with equally many.
        """
        stages = self.layout.pp_size
        if stages == 1:
            return [what(self.model(*_inputs(rows), **_routing(rows)), rows) for rows in batches]
        found: list[Found] = []
        height = max((rows.rows for rows in batches), default=0)
        level = [rows.with_rows(height) for rows in batches]
        for i in range(0, len(level), stages):
            # A schedule wants as many micro-batches as stages, all of one height: rows of padding fill up.
            some = PackedRows.joined(level[i : i + stages]).with_rows(stages * height)

            def keep(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
                found.append(what(output, PackedRows.from_tensors(batch)))
                return torch.zeros((), device=batch["input_ids"].device)

            self._run(some, keep, None)
        return found[: len(batches)]

    def token_logps(self, batches: list[PackedRows], temperature: float = 1.0) -> list[torch.Tensor]:
        """Log-probability of every token that bears loss ``[B, T]``, 0 elsewhere; the same on all stages.

        Over the tokens that a sampler kept, where ``side["kept"]`` says which those are.
        """

        def logps(output: Any, rows: PackedRows) -> torch.Tensor:
            return policy_logps(output.hidden_BTD, self.raw.head_weight, rows, temperature)[0]

        return self._shared(self.read(batches, logps), batches)

    def hidden(self, batches: list[PackedRows]) -> list[torch.Tensor]:
        """Last hidden states ``[B, T, D]`` of each micro-batch; on the last stage."""
        found = self.read(batches, lambda output, rows: output.hidden_BTD)
        return [states[: rows.rows] for states, rows in zip(found, batches, strict=False)]

    def _shared(self, found: list[torch.Tensor], batches: list[PackedRows]) -> list[torch.Tensor]:
        """What the last stage found, on every stage."""
        if self.layout.pp_size == 1:
            return found
        group = self.layout.pp_group
        last = dist.get_global_rank(group, self.layout.pp_size - 1)
        shared = []
        for i, rows in enumerate(batches):
            if found:
                values = found[i][: rows.rows].contiguous()
            else:
                values = torch.empty(rows.input_ids.shape, device=rows.input_ids.device)
            dist.broadcast(values, last, group=group)
            shared.append(values)
        return shared

    def _run(self, rows: PackedRows, criterion: Any, optimizer: Any) -> None:
        """Rows through the stages. Two models cut by one layout may differ in which layers stand where."""
        self.layout.stage_manager.stage_indices = self.raw.stage.ranges
        self.layout.run_pipeline(rows.tensors(), self.model, criterion, optimizer)


class Passes(Reader):
    """The model and its objective, run over rows.

    Args:
        parts: of this rank.
        booster, model, optimizer: as ColossalAI wrapped them.
        layout: the plugin; says whether there are stages.
    """

    def __init__(self, parts: Any, booster: Any, model: Any, optimizer: Any, layout: Any) -> None:
        super().__init__(parts.model, model, layout)
        self.parts, self.booster, self.optimizer = parts, booster, optimizer
        # A model with auxiliary losses of its own tells their counts, and weighs tokens as the objective does.
        self._counts_of = getattr(parts.model, "auxiliary_counts", None)

    def auxiliary_counts(self, micro: list[PackedRows]) -> dict[str, float]:
        """What this rank's auxiliary losses will be over, by name, where the model can tell before its forward pass."""
        if self._counts_of is None:
            return {}
        parts = [self._counts_of(m.position_ids, m.document_ids, m.model_weights) for m in micro]
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
        options = {} if self._counts_of is None else {"loss_weights": rows.model_weights}
        return self._total(self.model(*_inputs(rows), **options, **_routing(rows)), rows, shares)

    def look(self, batches: list[PackedRows]) -> list[dict[str, Metric]]:
        """The objective's loss and metrics on each of these micro-batches, without gradients."""
        return self.read(batches, lambda output, rows: self._objective(output, rows, Shares())[1])

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
        hidden_BTD = output.hidden_BTD
        if self.layout.parts is not None:
            hidden_BTD, rows = _own_run(hidden_BTD, rows, self.layout.parts)
        result = self.parts.objective(hidden_BTD, self.parts.model.head_weight, rows)
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

        self._run(PackedRows.joined(micro), criterion, optimizer)
        for name, aux in stage.take():
            found.append({f"train/{name}": Mean(aux.total, aux.count)})


def _own_run(
    hidden_BTD: torch.Tensor, rows: PackedRows, parts: ContextParallel
) -> tuple[torch.Tensor, PackedRows]:
    """A rank's run of some rows as rows of their own, for an objective that is a sum over tokens.

    The run's last state predicts the first token of the next: it comes along, with a state that predicts nothing.
    """
    T = hidden_BTD.shape[1]
    start, last = parts.rank * T, parts.rank == parts.ranks - 1
    if not last:
        hidden_BTD = torch.nn.functional.pad(hidden_BTD, (0, 0, 0, 1))
    return hidden_BTD, rows.between(start, start + T + (not last))


def _inputs(rows: PackedRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rows.input_ids, rows.position_ids, rows.document_ids


def _routing(rows: PackedRows) -> dict[str, RoutingRecord]:
    """Experts to take, where the rows say so."""
    return {"routing": RoutingRecord.from_rows(rows.side["routing"])} if "routing" in rows.side else {}
