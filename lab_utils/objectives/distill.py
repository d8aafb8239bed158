"""Distillation: the student's next-token distribution against a teacher's, over the whole vocabulary or by samples.

The loss is Σ w·divergence over the tokens that bear loss (DeepSeek-V4 §5.1.2: each context has its own teacher, with
weight w). reverse_kl, forward_kl and js compare whole distributions, rebuilt chunk by chunk from last hidden states and
heads. sampled_token estimates the reverse KL from the student's own tokens y alone:

    ∇KL(π ‖ p) = E_y[ (log π(y) - log p(y))·∇log π(y) ],   a policy gradient with advantage log p(y) - log π(y)

Shapes: B rows, T tokens, D and E widths of student and teacher, V vocabulary, N tokens with loss, n of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lab_utils.data.rows import PackedRows
from lab_utils.errors import DataError
from lab_utils.objectives import ObjectiveOutput
from lab_utils.objectives._kept import policy_logps
from lab_utils.telemetry.reductions import Mean, Metric

KINDS = {"reverse_kl": "reverse", "forward_kl": "forward", "js": "js"}
# Teacher's logits held at once while looking for the likeliest token.
CPU_CHUNK, DEVICE_CHUNK = 1 << 19, 1 << 26


class Distill:
    """The objective of ``objective.kind=distill``.

    Attributes:
        heads: head weight [V, E] of each teacher, by its place in ``objective.teachers``; the engine fills it in,
            at least with those of the rows at hand.
    """

    def __init__(self, section: Any, *, temperature: float = 1.0) -> None:
        """``temperature`` divides the logits of student and teacher alike: the student is compared as it samples."""
        self.section, self.temperature = section, temperature
        self.heads: dict[int, Tensor] = {}

    @classmethod
    def from_section(cls, section: Any, rollout: Any = None) -> Distill:
        return cls(section) if rollout is None else cls(section, temperature=rollout.temperature)

    def denominator(self, rows: PackedRows) -> float:
        """Tokens that bear loss, whatever their teacher's weight."""
        return float((rows.loss_weights[:, 1:] != 0).sum())

    def __call__(self, hidden_BTD: Tensor, head_weight_VD: Tensor, rows: PackedRows) -> ObjectiveOutput:
        """Loss and metrics of some rows.

        Args:
            hidden_BTD: the student's states after its final norm.
            head_weight_VD: the student's head.
            rows: answers or texts; ``loss_weights`` says which tokens are learnt from (other than 0). ``side``:
                ``teacher`` int [B, T], whose token it is; ``teacher_weight`` [B, T], w;
                ``teacher_hidden`` [B, T, E], the teacher's states after its final norm, token t's distribution coming
                from t - 1 as in the student. For sampled_token, in place of the states, ``teacher_logps`` [B, T] of the
                tokens themselves, at the temperature of sampling.

        Raises:
            DataError: a side tensor, or the head of a teacher, is missing.
        """
        by_samples = self.section.loss == "sampled_token"
        wanted = ("teacher", "teacher_weight", "teacher_logps" if by_samples else "teacher_hidden")
        if missing := [name for name in wanted if name not in rows.side]:
            raise DataError(
                f"Rows of objective.loss={self.section.loss} lack the side tensor '{missing[0]}'; found: "
                f"{', '.join(rows.side) or 'none'}."
            )
        bears_BT = rows.loss_weights != 0
        bears_BT[:, 0] = False
        tokens = bears_BT.sum().float()
        metrics: dict[str, Metric] = {}
        look = self._samples if by_samples else self._distributions
        divergence_N = look(hidden_BTD, head_weight_VD, rows, bears_BT, metrics)
        loss = (rows.side["teacher_weight"][bears_BT] * divergence_N).sum()
        metrics |= self._by_teacher(divergence_N.detach(), rows.side["teacher"][bears_BT], tokens)
        return ObjectiveOutput(loss=Mean(loss, tokens), metrics=metrics)

    def _samples(
        self,
        hidden_BTD: Tensor,
        head_VD: Tensor,
        rows: PackedRows,
        bears_BT: Tensor,
        metrics: dict[str, Metric],
    ) -> Tensor:
        """log π - log p of each token as value; as gradient that times ∇log π (see the module's head), [N]."""
        logps_BT, _, entropy_BT = policy_logps(hidden_BTD, head_VD, rows, self.temperature)
        metrics["entropy"] = Mean(entropy_BT.sum(), bears_BT.sum().float())
        logps_N = logps_BT[bears_BT]
        gap_N = logps_N.detach() - rows.side["teacher_logps"][bears_BT]
        return gap_N * (1 + logps_N - logps_N.detach())

    def _distributions(
        self,
        hidden_BTD: Tensor,
        head_VD: Tensor,
        rows: PackedRows,
        bears_BT: Tensor,
        metrics: dict[str, Metric],
    ) -> Tensor:
        """Divergence of each token's whole distributions, [N]; adds entropy and agreement of the likeliest tokens."""
        hidden_ND = _cooled(hidden_BTD[:, :-1][bears_BT[:, 1:]], self.temperature)
        teacher_NE = _cooled(rows.side["teacher_hidden"][:, :-1][bears_BT[:, 1:]], self.temperature)
        who_N = rows.side["teacher"][bears_BT].long()
        # The empty sum keeps the graph, so that a micro-batch without a loss token can be backpropagated.
        divergence_N = _full(hidden_ND).sum(-1) * 0.0
        agreed = entropy = torch.zeros((), device=hidden_BTD.device)
        for teacher in who_N.unique().tolist():
            (own_M,) = torch.where(who_N == teacher)
            theirs, head_VE = (hidden_ND[own_M], teacher_NE[own_M]), self._head(teacher)
            divergence_N = divergence_N.index_copy(0, own_M, self._divergence(*theirs, head_VD, head_VE))
            with torch.no_grad():
                top_M = _likeliest(theirs[1], head_VE)
                _, same_M, entropy_M = _operator("linear_logprob", theirs[0])(theirs[0], head_VD, top_M)
            agreed, entropy = agreed + same_M.sum(), entropy + entropy_M.sum()
        tokens = bears_BT.sum().float()
        metrics["mean_token_accuracy"], metrics["entropy"] = (
            Mean(agreed.float(), tokens),
            Mean(entropy, tokens),
        )
        return divergence_N

    def _divergence(self, hidden_MD: Tensor, teacher_ME: Tensor, head_VD: Tensor, head_VE: Tensor) -> Tensor:
        kind = KINDS[self.section.loss]
        options = {"beta": self.section.beta} if kind == "js" else {}
        operator = _operator("linear_kl", hidden_MD)
        return operator(hidden_MD, head_VD, teacher_ME, head_VE, kind=kind, **options)

    def _by_teacher(self, divergence_N: Tensor, who_N: Tensor, tokens: Tensor) -> dict[str, Metric]:
        """The mean divergence, unweighted; of each teacher too where there are several."""
        metrics: dict[str, Metric] = {"teacher_kl": Mean(divergence_N.sum(), tokens)}
        number = len(self.section.teachers)
        for teacher in range(number) if number > 1 else ():
            own_N = who_N == teacher
            metrics[f"teacher_kl/{teacher}"] = Mean((divergence_N * own_N).sum(), own_N.sum().float())
        return metrics

    def _head(self, teacher: int) -> Tensor:
        if teacher not in self.heads:
            raise DataError(
                f"Rows have tokens of teacher {teacher}, whose head is not there (heads: {sorted(self.heads)}): put it "
                "into objective.heads before these rows."
            )
        return self.heads[teacher]


def _cooled(hidden: Tensor, temperature: float) -> Tensor:
    # in bf16, the quotient would be rounded
    return hidden if temperature == 1.0 else _full(hidden) / temperature


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _likeliest(hidden_NE: Tensor, head_VE: Tensor) -> Tensor:
    """The token with the largest logit, [N]; logits exist for one chunk of tokens at a time."""
    held = CPU_CHUNK if hidden_NE.device.type == "cpu" else DEVICE_CHUNK
    parts = hidden_NE.split(max(16, held // len(head_VE)))
    head_EV = _full(head_VE).T  # products in bf16 would tie
    return torch.cat([(_full(hidden_nE) @ head_EV).argmax(1) for hidden_nE in parts])


def _operator(name: str, like: Tensor) -> Any:
    from kernels.registry import get

    return get(name, like.device.type, like.dtype)


OBJECTIVE = Distill
