"""A reward model: Bradley-Terry on the scores of a chosen and a rejected answer.

The head is one row, [1, D]; a document's score is its product with the hidden state of the document's last token,
which has seen all of it. Loss of a pair (arXiv 2307.09288, eq. 2, whose margin m is one number here; the second term
is that of 2312.09244):

    -log σ(chosen - rejected - margin) + centring·(chosen + rejected)²

Shapes: B rows, T tokens, D model, N documents, P pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lab_utils.data.pairs import CHOSEN, REJECTED
from lab_utils.data.rows import PackedRows
from lab_utils.objectives import ObjectiveOutput
from lab_utils.telemetry.reductions import Max, Mean, Metric, Min


class Reward:
    """Sums over pairs, in fp32 whatever the model's precision."""

    def __init__(self, section: Any) -> None:
        """``section``: a ``RewardObjective``."""
        self.margin, self.centring = section.margin, section.centring

    @classmethod
    def from_section(cls, section: Any) -> Reward:
        return cls(section)

    def denominator(self, rows: PackedRows) -> float:
        """Pairs in the rows."""
        return float((last_tokens(rows) & (rows.side["role"] == CHOSEN)).sum())

    def __call__(self, hidden_BTD: Tensor, head_weight_VD: Tensor, rows: PackedRows) -> ObjectiveOutput:
        """Loss and metrics of some rows.

        Args:
            hidden_BTD: the model's states after its final norm.
            head_weight_VD: the scalar head, [1, D].
            rows: whole pairs, with ``side["role"]`` [B, T].

        Returns:
            Sums over pairs: loss, ``accuracy`` (the chosen answer scores higher) and ``margin`` (by how much); and
            ``mean_reward``, ``min_reward``, ``max_reward`` over the scores of all answers.
        """
        role_BT = rows.side["role"]
        last_BT = last_tokens(rows)
        chosen_P, rejected_P = (
            scores(hidden_BTD, head_weight_VD, last_BT & (role_BT == role)) for role in (CHOSEN, REJECTED)
        )
        gap_P = chosen_P - rejected_P
        loss_P = -logsigmoid(gap_P - self.margin) + self.centring * (chosen_P + rejected_P) ** 2
        count = torch.tensor(float(len(gap_P)), device=gap_P.device)
        metrics: dict[str, Metric] = {
            "accuracy": Mean((gap_P.detach() > 0).sum().float(), count),
            "margin": Mean(gap_P.detach().sum(), count),
            **_extent(torch.cat([chosen_P, rejected_P]).detach()),
        }
        return ObjectiveOutput(Mean(loss_P.sum(), count), metrics)


def last_tokens(rows: PackedRows) -> Tensor:
    """Which tokens end a document, bool [B, T]."""
    ends_BT = rows.document_ids >= 0
    ends_BT[:, :-1] &= rows.document_ids[:, :-1] != rows.document_ids[:, 1:]
    return ends_BT


def scores(hidden_BTD: Tensor, head_weight_1D: Tensor, where_BT: Tensor) -> Tensor:
    """Scores of the hidden states at ``where_BT``, fp32 [N], in the order of the rows."""
    return hidden_BTD[where_BT].float() @ head_weight_1D[0].float()


def _extent(rewards_N: Tensor) -> dict[str, Metric]:
    if not len(rewards_N):  # rows of padding say nothing about the smallest and largest
        zero = rewards_N.new_zeros(())
        return {"mean_reward": Mean(zero, zero), "min_reward": Min(math.inf), "max_reward": Max(-math.inf)}
    count = torch.tensor(float(len(rewards_N)), device=rewards_N.device)
    return {
        "mean_reward": Mean(rewards_N.sum(), count),
        "min_reward": Min(rewards_N.min()),
        "max_reward": Max(rewards_N.max()),
    }


OBJECTIVE = Reward
