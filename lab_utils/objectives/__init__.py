"""Objectives: one file a kind, each with a class named in ``OBJECTIVE``; ``recipe.objective.kind`` names the file.

An objective is a pure function of hidden states and packed rows. It returns *sums* with their counts, so that the
engine's reduction over micro-batches and ranks is the mean over the whole batch whatever the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lab_utils.errors import RecipeError
from lab_utils.registry import load

if TYPE_CHECKING:
    from torch import Tensor

    from lab_utils.data.rows import PackedRows
    from lab_utils.telemetry.reductions import Mean, Metric


@dataclass(frozen=True)
class ObjectiveOutput:
    """``loss.total`` is a scalar with a gradient (a sum, in nat), ``loss.count`` the sum of weights it is over.

    ``metrics`` are named by their leaf (``mean_token_accuracy``); the engine puts ``train/`` or ``eval/`` before it.
    """

    loss: Mean
    metrics: dict[str, Metric] = field(default_factory=dict)


class Objective(Protocol):
    def __call__(self, hidden_BTD: Tensor, head_weight_VD: Tensor, rows: PackedRows) -> ObjectiveOutput: ...

    def denominator(self, rows: PackedRows) -> float:
        """What the loss of these rows will be divided by, known before the forward pass; the engine adds up all."""
        ...


def get_objective(section: Any, rollout: Any = None) -> Objective:
    """The objective of a recipe's ``objective`` section.

    Args:
        rollout: the recipe's section of that name, for those that learn from samples.
    """
    try:
        kind = load(__name__, section.kind).OBJECTIVE
    except KeyError as error:
        raise RecipeError(f"objective.kind: {error.args[0]}") from None
    return kind.from_section(section) if rollout is None else kind.from_section(section, rollout)
