"""Learning from pairs of answers: dpo and its kin, on log-probabilities of whole answers.

Shapes: B rows, T tokens, D model (in ``hidden``) or documents of a row, V vocabulary, P pairs.

``x`` of an answer is what a loss compares: log(π/π_ref) summed over its tokens, or log π where the loss needs no
reference; divided by the number of its tokens with ``length_normalised`` (simpo and orpo: always). With Δ = x of the
chosen minus x of the rejected answer, ε label smoothing:

    dpo     -(1-ε)·log σ(βΔ) - ε·log σ(-βΔ)                      arXiv 2305.18290, eq. 7; ε: cDPO
    robust  (-(1-ε)·log σ(βΔ) + ε·log σ(-βΔ)) / (1-2ε)            2403.00409
    hinge   max(0, 1 - βΔ)                                        SLiC 2305.10425, as in RSO 2309.06657
    ipo     (Δ - 1/2β)²                                           2310.12036, eq. 17, where x is the sum; TRL has the
                                                                  mean, which is ``length_normalised`` here
    simpo   as dpo, of βΔ - γ                                     2405.14734, eq. 6: γ is not multiplied by β
    cpo     as dpo                                                2401.08417, whose second term is sft_weight's
    orpo    -x(chosen) - β·log σ(log odds(chosen) - log odds(rejected)),  odds = p/(1-p), p = exp x
                                                                  2403.07691, eq. 6 and 7, λ = β
    kto     λ_D·σ(β(z0 - x)) of chosen, λ_U·σ(β(x - z0)) of rejected answers    2402.01306, eq. 8

kto's is a mean over answers, every other one over pairs. z0 is the mean x of answers to other prompts over the global
batch, at least 0 and without gradient; the paper's is over a micro-batch, which would make it depend on the layout.

``sft_weight`` adds the chosen answer's negative log-likelihood, a mean over its tokens, then over pairs: all pairs
count alike, however long. cpo's paper has it with weight 1 (of sums), which is cpo's default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from lab_utils.data.pairs import CHOSEN, MISMATCHED, REJECTED
from lab_utils.data.rows import PackedRows
from lab_utils.errors import RunError
from lab_utils.objectives import ObjectiveOutput
from lab_utils.objectives._logps import document_roles, document_sums, token_logps
from lab_utils.telemetry.reductions import Mean

MEANS = ("simpo", "orpo")  # losses of mean log-probabilities, whatever length_normalised
# p = 1 has infinite odds; a mean log-probability above this counts as this, and isn't pushed.
CERTAIN = -1e-6


@dataclass(frozen=True)
class _Answers:
    """The answers of one role, [P] each: log-probability, number of tokens, and x."""

    logps_P: Tensor
    tokens_P: Tensor
    x_P: Tensor


class Preference:
    """Loss and metrics of pairs; see the module's head."""

    def __init__(self, section: Any) -> None:
        """``section``: a ``PreferenceObjective``; what it leaves out is its loss's own."""
        self.section = section.resolved()
        self.means = section.length_normalised or section.loss in MEANS
        self.per_pair = 2 if section.loss == "kto" else 1  # what the loss is a mean over

    @classmethod
    def from_section(cls, section: Any) -> Preference:
        return cls(section)

    def denominator(self, rows: PackedRows) -> float:
        """Pairs in the rows; for kto, answers."""
        return float(self.per_pair * int((document_roles(rows) == CHOSEN).sum()))

    def statistics(self, hidden_BTD: Tensor, head_weight_VD: Tensor, rows: PackedRows) -> dict[str, Mean]:
        """kto's ``z0`` of these rows, from their mismatched documents; nothing for other losses.

        The mean over the whole global batch, [B, 1] in ``rows.side["z0"]``, is what the loss needs.
        """
        if self.section.loss != "kto":
            return {}
        roles_BD = document_roles(rows)
        logps_BT, _, _ = token_logps(hidden_BTD, head_weight_VD, _of_roles(rows, MISMATCHED))
        x_P = self._answers(logps_BT, rows, roles_BD == MISMATCHED).x_P.detach()
        return {"z0": Mean(x_P.sum(), _count(x_P))}

    def __call__(self, hidden_BTD: Tensor, head_weight_VD: Tensor, rows: PackedRows) -> ObjectiveOutput:
        """Loss and metrics of some rows.

        Args:
            hidden_BTD: the model's states after its final norm.
            head_weight_VD: the language-model head.
            rows: whole pairs, with ``side``: ``role`` [B, T], ``reference_logps`` [B, T] for the losses that need a
                reference, ``z0`` [B, 1] for kto.

        Returns:
            Sums over pairs. Of the metrics, ``logps/…`` are sums over an answer's tokens whatever the loss, in nat;
            ``mean_token_accuracy`` is over the tokens of chosen answers, ``entropy`` over those of both.

        Raises:
            RunError: a side tensor is missing.
        """
        read = _of_roles(rows, CHOSEN, REJECTED)
        logps_BT, correct_BT, entropy_BT = token_logps(hidden_BTD, head_weight_VD, read)
        roles_BD = document_roles(rows)
        chosen, rejected = (self._answers(logps_BT, rows, roles_BD == role) for role in (CHOSEN, REJECTED))
        metrics = {}
        if self.section.loss == "kto":
            z0_BD = _side(rows, "z0").float().clamp(min=0).expand(roles_BD.shape)
            z0_P = z0_BD[roles_BD == CHOSEN]
            loss_P = self._kto(chosen.x_P, rejected.x_P, z0_P)
            metrics["kl"] = Mean(z0_P.sum(), _count(z0_P))
        else:
            loss_P = _LOSSES[self.section.loss](chosen.x_P, rejected.x_P, self.section)
        if self.section.sft_weight:
            loss_P = loss_P - self.section.sft_weight * self.per_pair * chosen.logps_P / chosen.tokens_P
        metrics |= self._metrics(chosen, rejected)
        tokens_BT = read.loss_weights[:, 1:] != 0
        of_chosen_BT = tokens_BT & (rows.side["role"][:, 1:] == CHOSEN)
        hits = correct_BT[:, 1:][of_chosen_BT].sum().float()
        metrics["mean_token_accuracy"] = Mean(hits, of_chosen_BT.sum().float())
        metrics["entropy"] = Mean(entropy_BT.sum(), tokens_BT.sum().float())
        return ObjectiveOutput(Mean(loss_P.sum(), self.per_pair * _count(loss_P)), metrics)

    def _answers(self, logps_BT: Tensor, rows: PackedRows, which_BD: Tensor) -> _Answers:
        """Those of the documents ``which_BD``, along the rows: so pair by pair, in every role."""
        bears_BT = rows.loss_weights != 0
        tokens_P = document_sums(bears_BT, rows)[which_BD].clamp(min=1)
        logps_P = document_sums(logps_BT, rows)[which_BD]
        x_P = logps_P
        if self.section.needs_reference:
            # Summed after the subtraction: two long answers' sums are large, their difference may be small.
            reference_BT = _side(rows, "reference_logps") * bears_BT
            x_P = document_sums(logps_BT - reference_BT, rows)[which_BD]
        return _Answers(logps_P, tokens_P, x_P / tokens_P if self.means else x_P)

    def _kto(self, chosen_P: Tensor, rejected_P: Tensor, z0_P: Tensor) -> Tensor:
        """1 - σ(a) is written σ(-a), which is exact where it is small."""
        section = self.section
        gain_P = section.desirable_weight * torch.sigmoid(section.beta * (z0_P - chosen_P))
        return gain_P + section.undesirable_weight * torch.sigmoid(section.beta * (rejected_P - z0_P))

    def _metrics(self, chosen: _Answers, rejected: _Answers) -> dict[str, Mean]:
        """Rewards are β·x."""
        reward_P, other_P = (self.section.beta * answers.x_P.detach() for answers in (chosen, rejected))
        values = {
            "rewards/chosen": reward_P,
            "rewards/rejected": other_P,
            "rewards/margins": reward_P - other_P,
            "rewards/accuracies": (reward_P > other_P).float(),
            "logps/chosen": chosen.logps_P.detach(),
            "logps/rejected": rejected.logps_P.detach(),
        }
        return {leaf: Mean(value_P.sum(), _count(value_P)) for leaf, value_P in values.items()}


# -- losses of a pair: x of the chosen and of the rejected answer -> [P] ------------------------------------------


def _smoothed(z_P: Tensor, share: float) -> Tensor:
    """-log σ(z), with a share of the pairs taken to be the wrong way round."""
    return -(1 - share) * logsigmoid(z_P) - share * logsigmoid(-z_P)


def _sigmoid(chosen_P: Tensor, rejected_P: Tensor, section: Any) -> Tensor:
    return _smoothed(section.beta * (chosen_P - rejected_P), section.label_smoothing)


def _simpo(chosen_P: Tensor, rejected_P: Tensor, section: Any) -> Tensor:
    return _smoothed(section.beta * (chosen_P - rejected_P) - section.target_margin, section.label_smoothing)


def _robust(chosen_P: Tensor, rejected_P: Tensor, section: Any) -> Tensor:
    z_P, share = section.beta * (chosen_P - rejected_P), section.label_smoothing
    return (-(1 - share) * logsigmoid(z_P) + share * logsigmoid(-z_P)) / (1 - 2 * share)


def _hinge(chosen_P: Tensor, rejected_P: Tensor, section: Any) -> Tensor:
    return relu(1 - section.beta * (chosen_P - rejected_P))


def _ipo(chosen_P: Tensor, rejected_P: Tensor, section: Any) -> Tensor:
    return (chosen_P - rejected_P - 1 / (2 * section.beta)) ** 2


def _orpo(chosen_P: Tensor, rejected_P: Tensor, section: Any) -> Tensor:
    return -chosen_P - section.beta * logsigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))


def _log_odds(x: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp x, without cancellation at either end."""
    x = x.clamp(max=CERTAIN)
    rest = torch.where(x > -log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    return x - rest


_LOSSES: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "dpo": _sigmoid,
    "cpo": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "simpo": _simpo,
    "orpo": _orpo,
}


# -- rows ---------------------------------------------------------------------------------------------------------


def _of_roles(rows: PackedRows, *roles: int) -> PackedRows:
    """The same rows with loss on documents of these roles only: the head skips the others."""
    of_BT = sum((rows.side["role"] == role).float() for role in roles)
    return replace(rows, loss_weights=rows.loss_weights * of_BT)


def _side(rows: PackedRows, name: str) -> Tensor:
    if name not in rows.side:
        raise RunError(
            f"The rows carry no {name}, which the objective needs: give it as rows.side[{name!r}] (found: "
            f"{', '.join(sorted(rows.side)) or 'nothing'})."
        )
    return rows.side[name]


def _count(values_P: Tensor) -> Tensor:
    return torch.tensor(float(len(values_P)), device=values_P.device)


OBJECTIVE = Preference
