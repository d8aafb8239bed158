"""Policy gradients on sampled answers: GRPO, GSPO and REINFORCE, with their normalisations, KL and sequence mask.

A document is one answer with its prompt; its advantage stands on all of its tokens. With u = π/π_old of a token, the
loss is, over the tokens that bear loss and in one of three normalisations,

    -M·min(u·A, clip(u, 1 - clip_low, 1 + clip_high)·A) + kl_weight·KL        M: the sequence mask, 0 or 1

gspo puts the ratio of the whole answer in u's place, reinforce log π without a ratio. What the sampler's own
log-probabilities differ from the trainer's is measured and not corrected.

Shapes: B rows, T tokens, D model (in ``hidden``) or documents of a row, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lab_utils.data.rows import PackedRows
from lab_utils.errors import DataError, RecipeError
from lab_utils.objectives import ObjectiveOutput
from lab_utils.objectives._kept import policy_logps
from lab_utils.objectives._logps import document_sums
from lab_utils.objectives._ratios import at_tokens, clipped_gain, document_means, kl_estimate, ratio
from lab_utils.telemetry.reductions import Max, Mean, Metric, Min


class Grpo:
    """The objective of ``objective.kind=grpo``; every field of the section that concerns the loss is read here.

    The three losses, where log-ratios are of the trained policy to the one that sampled:

    * grpo: u of each token (arXiv 2402.03300 eq. 3; DAPO's bounds, 2503.14476).
    * gspo: s = exp(mean log u over the answer) on each of its tokens (2507.18071 eq. 5-7). Under
      ``normalisation=sequence`` the gradient is the paper's, s·A times the mean of the tokens' ∇log π (eq. 10). An
      answer's ratio moves by orders of magnitude less than a token's: the paper clips at 3e-4 and 4e-4 (§5.1).
    * reinforce: -A·log π; samples are taken to be the policy's own.

    An answer of negative advantage whose mean log(π_old/π) exceeds ``sequence_mask`` loses its policy term (V3.2 §3.1);
    its KL and its place in the denominator stay.
    """

    def __init__(self, section: Any, *, temperature: float = 1.0, max_new_tokens: int | None = None) -> None:
        """``temperature`` divides the logits in every log-probability; ``max_new_tokens``: normalisation=constant.

        Raises:
            RecipeError: ``normalisation=constant`` without a longest answer to divide by.
        """
        if section.normalisation == "constant" and max_new_tokens is None:
            raise RecipeError(
                "objective.normalisation=constant divides by rollout.max_new_tokens, but the recipe has no rollout "
                "section: add it, or choose token."
            )
        self.section, self.temperature, self.max_new_tokens = section, temperature, max_new_tokens

    @classmethod
    def from_section(cls, section: Any, rollout: Any = None) -> Grpo:
        if rollout is None:
            return cls(section)
        return cls(section, temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens)

    def denominator(self, rows: PackedRows) -> float:
        """Answers (sequence), their tokens (token), or answers × longest answer (constant)."""
        return float(self._count(rows, _bearing(rows)))

    def __call__(self, hidden_BTD: Tensor, head_weight_VD: Tensor, rows: PackedRows) -> ObjectiveOutput:
        """Loss and metrics of some rows.

        Args:
            hidden_BTD: the model's states after its final norm.
            head_weight_VD: the language-model head.
            rows: answers; ``loss_weights`` says which tokens were sampled (other than 0), their size has no meaning.
                ``side``, each fp32 [B, T] and at the temperature of sampling: ``advantages``; ``old_logps`` of the
                policy that sampled, as the trainer computes them (absent: the policy still is that one);
                ``reference_logps`` where ``kl_weight`` is not 0; ``sampler_logps`` as the sampler said, to be
                measured. ``kept`` int [B, T, S]: see ``policy_logps``.

        Raises:
            DataError: a side tensor is missing.
        """
        logps_BT, _, entropy_BT = policy_logps(hidden_BTD, head_weight_VD, rows, self.temperature)
        bears_BT = _bearing(rows)
        old_BT = rows.side.get("old_logps", logps_BT.detach())
        log_ratio_BT = (logps_BT - old_BT).where(bears_BT, 0.0)
        advantages_BT = _side(rows, "advantages")
        loss_count = self._count(rows, bears_BT)
        tokens = bears_BT.sum().float()
        metrics: dict[str, Metric] = {"entropy": Mean(entropy_BT.sum(), tokens)}

        gain_BT = self._gain(logps_BT, log_ratio_BT, advantages_BT, bears_BT, rows, metrics)
        if self.section.sequence_mask is not None:
            gain_BT = gain_BT * self._mask(log_ratio_BT, advantages_BT, bears_BT, rows, metrics)
        weights_BT = self._weights(bears_BT, rows)
        policy_loss = -(gain_BT.where(bears_BT, 0.0) * weights_BT).sum()
        metrics["policy_loss"] = Mean(policy_loss.detach(), loss_count)
        loss = policy_loss
        if self.section.kl_weight:
            reference_BT = _side(rows, "reference_logps")
            kl_BT = kl_estimate(self.section.kl_estimator, logps_BT, reference_BT, log_ratio_BT)
            kl_BT = kl_BT.where(bears_BT, 0.0)
            loss = loss + self.section.kl_weight * (kl_BT * weights_BT).sum()
            metrics["kl"] = Mean(kl_BT.detach().sum(), tokens)
        if "sampler_logps" in rows.side:
            metrics |= _sampling(old_BT, rows.side["sampler_logps"], bears_BT, tokens)
        return ObjectiveOutput(loss=Mean(loss, loss_count), metrics=metrics)

    def _gain(
        self,
        logps_BT: Tensor,
        log_ratio_BT: Tensor,
        advantages_BT: Tensor,
        bears_BT: Tensor,
        rows: PackedRows,
        metrics: dict[str, Metric],
    ) -> Tensor:
        """What each token contributes to the objective that is maximised; adds the shares that were clipped."""
        section = self.section
        if section.loss == "reinforce":
            return advantages_BT * logps_BT
        if section.loss == "gspo":
            log_ratio_BT = at_tokens(document_means(log_ratio_BT, bears_BT, rows), rows)
        gain_BT, low_BT, high_BT = clipped_gain(
            ratio(log_ratio_BT), advantages_BT, section.clip_low, section.clip_high, section.dual_clip
        )
        metrics |= _clipped(low_BT & bears_BT, high_BT & bears_BT, bears_BT, rows)
        return gain_BT

    def _mask(
        self,
        log_ratio_BT: Tensor,
        advantages_BT: Tensor,
        bears_BT: Tensor,
        rows: PackedRows,
        metrics: dict[str, Metric],
    ) -> Tensor:
        """1 on the answers that stay, 0 on those left out (V3.2); adds their share."""
        drift_BD = -document_means(log_ratio_BT.detach(), bears_BT, rows)
        advantage_BD = document_means(advantages_BT, bears_BT, rows)
        out_BD = (drift_BD > self.section.sequence_mask) & (advantage_BD < 0)
        metrics["masked_sequences"] = Mean(out_BD.sum().float(), _answers(bears_BT, rows))
        return 1.0 - at_tokens(out_BD.float(), rows)

    def _weights(self, bears_BT: Tensor, rows: PackedRows) -> Tensor:
        """What a token's term counts for in the sum whose denominator is ``_count``."""
        if self.section.normalisation != "sequence":
            return bears_BT.float()
        lengths_BT = at_tokens(document_sums(bears_BT.float(), rows), rows)
        return bears_BT / lengths_BT.clamp(min=1.0)

    def _count(self, rows: PackedRows, bears_BT: Tensor) -> Tensor:
        if self.section.normalisation == "token":
            return bears_BT.sum().float()
        answers = _answers(bears_BT, rows)
        return answers if self.section.normalisation == "sequence" else answers * self.max_new_tokens


def _bearing(rows: PackedRows) -> Tensor:
    """Which tokens bear loss, bool [B, T]; a row's first token is predicted by nothing."""
    bears_BT = rows.loss_weights != 0
    bears_BT[:, 0] = False
    return bears_BT


def _answers(bears_BT: Tensor, rows: PackedRows) -> Tensor:
    """Number of documents with a token that bears loss."""
    return (document_sums(bears_BT, rows) > 0).sum().float()


def _side(rows: PackedRows, name: str) -> Tensor:
    try:
        return rows.side[name]
    except KeyError:
        raise DataError(
            f"Rows of objective.kind=grpo lack the side tensor '{name}'; found: {', '.join(rows.side) or 'none'}."
        ) from None


def _clipped(low_BT: Tensor, high_BT: Tensor, bears_BT: Tensor, rows: PackedRows) -> dict[str, Metric]:
    """Shares of tokens at the bounds, and the shares of the answers with the fewest and the most."""
    tokens = bears_BT.sum().float()
    answers_BD = document_sums(bears_BT, rows) > 0
    lows_BD = document_means(low_BT.float(), bears_BT, rows)
    highs_BD = document_means(high_BT.float(), bears_BT, rows)
    return {
        "clip_ratio/low_mean": Mean(low_BT.sum().float(), tokens),
        "clip_ratio/high_mean": Mean(high_BT.sum().float(), tokens),
        "clip_ratio/region_mean": Mean((low_BT | high_BT).sum().float(), tokens),
        "clip_ratio/low_min": Min(-_largest(-lows_BD, answers_BD)),
        "clip_ratio/high_max": Max(_largest(highs_BD, answers_BD)),
    }


def _sampling(old_BT: Tensor, sampler_BT: Tensor, bears_BT: Tensor, tokens: Tensor) -> dict[str, Metric]:
    """How far the sampler's probabilities are from the trainer's, for the same weights and tokens."""
    gap_BT = (old_BT - sampler_BT).where(bears_BT, 0.0)
    weight_BT = ratio(gap_BT)
    return {
        "sampling/sampling_logp_difference/mean": Mean(gap_BT.abs().sum(), tokens),
        "sampling/sampling_logp_difference/max": Max(_largest(gap_BT.abs(), bears_BT)),
        "sampling/importance_sampling_ratio/min": Min(-_largest(-weight_BT, bears_BT)),
        "sampling/importance_sampling_ratio/mean": Mean((weight_BT * bears_BT).sum(), tokens),
        "sampling/importance_sampling_ratio/max": Max(_largest(weight_BT, bears_BT)),
    }


def _largest(x: Tensor, where: Tensor) -> Tensor:
    """Largest value there, -inf if there is none."""
    none = x.new_full((1,), -torch.inf)
    return torch.cat([x.where(where, -torch.inf).flatten(), none]).max()


OBJECTIVE = Grpo
