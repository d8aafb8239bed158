"""Supervised fine-tuning: weighted negative log-likelihood of the next token, in chunks of tokens.

Shapes: B rows, T tokens, D model, V vocabulary, N predicted tokens that carry weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lab_utils.data.rows import PackedRows
from lab_utils.objectives import ObjectiveOutput
from lab_utils.telemetry.reductions import Mean

LogProb = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Sft:
    """Σ w·nll over the rows, with Σ w as its count; logits exist for one chunk of tokens at a time."""

    def __init__(self, logprob: LogProb | None = None) -> None:
        """``logprob``: an implementation of the operator ``linear_logprob``; absent: the registry's choice."""
        self.logprob = logprob

    @classmethod
    def from_section(cls, section: Any) -> Sft:
        return cls()

    def denominator(self, rows: PackedRows) -> float:
        return float(rows.loss_weights[:, 1:].sum(dtype=torch.float64))

    def __call__(self, hidden_BTD: Tensor, head_weight_VD: Tensor, rows: PackedRows) -> ObjectiveOutput:
        """Loss and metrics of some rows.

        Args:
            hidden_BTD: the model's states after its final norm.
            head_weight_VD: the language-model head.
            rows: the rows that gave ``hidden_BTD``; ``loss_weights[b, t]`` weighs the prediction of token t from t-1.

        Returns:
            Sums over the tokens with weight: loss, and the metrics ``mean_token_accuracy`` and ``entropy``.
        """
        weights_BT = rows.loss_weights[:, 1:]
        # Prompts and padding carry no weight: the head, the largest product of a small model, skips them.
        keep_BT = weights_BT != 0
        hidden_ND = hidden_BTD[:, :-1][keep_BT]
        targets_N = rows.input_ids[:, 1:][keep_BT]
        weights_N = weights_BT[keep_BT]
        if targets_N.numel() == 0:
            none = torch.zeros((), device=hidden_BTD.device)
            # The empty sum keeps the graph, so that a micro-batch without a loss token can be backpropagated.
            return _output(hidden_ND.float().sum(), none, none, none, none)
        logprob = self.logprob or _registered(hidden_ND)
        logprob_N, correct_N, entropy_N = logprob(hidden_ND, head_weight_VD, targets_N)
        count = torch.tensor(float(targets_N.numel()), device=hidden_BTD.device)
        return _output(
            -(weights_N * logprob_N).sum(), weights_N.sum(), correct_N.sum().float(), entropy_N.sum(), count
        )


def _output(
    loss: Tensor, weight: Tensor, correct: Tensor, entropy: Tensor, tokens: Tensor
) -> ObjectiveOutput:
    metrics = {"mean_token_accuracy": Mean(correct, tokens), "entropy": Mean(entropy, tokens)}
    return ObjectiveOutput(loss=Mean(loss, weight), metrics=metrics)


def _registered(hidden_ND: Tensor) -> LogProb:
    from kernels.registry import get

    return get("linear_logprob", hidden_ND.device.type, hidden_ND.dtype)


OBJECTIVE = Sft
