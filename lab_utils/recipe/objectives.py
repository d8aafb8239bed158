"""What a run optimises: one section a kind, told apart by ``objective.kind``; ``objective.loss`` is the variant.

Also ``rollout``, for the kinds that learn from samples of the model's own. Symbols as the papers have them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lab_utils.recipe.base import Section

MODES = ("chat", "thinking", "max")
Mode = Literal["chat", "thinking", "max"]


class SftObjective(Section):
    kind: Literal["sft"] = "sft"
    loss: Literal["nll"] = Field("nll", description="Negative log-likelihood of the supervised tokens.")


class PreferenceObjective(Section):
    kind: Literal["preference"]
    loss: Literal["dpo", "hinge", "ipo", "robust", "simpo", "orpo", "kto", "cpo"] = Field(
        "dpo", description="Preference loss; simpo, orpo and cpo need no reference model."
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="β: strength of the pull towards the reference (ipo: τ, orpo: λ). Absent: the paper's, which is "
        "0.1, for simpo 2.0.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of pairs taken to be the wrong way round (dpo, robust, cpo, simpo).",
    )
    sft_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the chosen answers' negative log-likelihood, a mean over their tokens. Absent: 0, for "
        "cpo 1.0.",
    )
    length_normalised: bool = Field(
        False, description="Mean instead of summed log-probabilities of an answer (simpo and orpo always do)."
    )
    target_margin: float | None = Field(
        None, ge=0, description="γ of simpo: reward margin that a pair should have. Absent: β/2."
    )
    desirable_weight: float = Field(1.0, gt=0, description="λ of kto's chosen answers.")
    undesirable_weight: float = Field(1.0, gt=0, description="λ of kto's rejected answers.")
    reference: Literal["cached", "live"] = Field(
        "cached",
        description="cached: the reference's log-probabilities are computed once, before training, and kept beside the "
        "data; live: the reference stays in memory and is run in every step.",
    )
    reference_source: str | None = Field(
        None,
        description="Weights of the reference, as model.source; absent: those that training starts from.",
    )

    @property
    def needs_reference(self) -> bool:
        return self.loss not in ("simpo", "orpo", "cpo")

    def resolved(self) -> PreferenceObjective:
        """The same with each loss's own values in the fields that the recipe leaves out.

        A recipe keeps them absent, so that a change of loss brings its own. They are the papers' (``objectives/
        preference.py`` names them); simpo's, γ/β = 0.5 included, those that its authors start from.
        """
        beta = self.beta or (2.0 if self.loss == "simpo" else 0.1)
        own = {
            "beta": beta,
            "sft_weight": 1.0 if self.loss == "cpo" else 0.0,
            "target_margin": beta / 2 if self.loss == "simpo" else 0.0,
        }
        return self.model_copy(update={name: v for name, v in own.items() if getattr(self, name) is None})

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> PreferenceObjective:
        of = {
            "target_margin": ("simpo",),
            "desirable_weight": ("kto",),
            "undesirable_weight": ("kto",),
            "label_smoothing": ("dpo", "robust", "cpo", "simpo"),
            "length_normalised": ("dpo", "hinge", "ipo", "robust", "cpo", "kto"),
            "sft_weight": ("dpo", "hinge", "ipo", "robust", "cpo", "simpo", "kto"),
            "reference": ("dpo", "hinge", "ipo", "robust", "kto"),
            "reference_source": ("dpo", "hinge", "ipo", "robust", "kto"),
        }
        _refuse_idle(self, of, "loss", self.loss)
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError(
                "objective.loss=robust needs objective.label_smoothing above 0: without it, it is dpo"
            )
        return self


class RewardObjective(Section):
    kind: Literal["reward"]
    loss: Literal["bradley_terry"] = Field("bradley_terry", description="-log σ(chosen - rejected - margin).")
    margin: float = Field(0.0, ge=0, description="Score by which the chosen answer should lead.")
    centring: float = Field(
        0.01, ge=0, description="Weight of (chosen + rejected)², which holds the scores around zero."
    )


class RewardSource(Section):
    name: str = Field(
        "exact", description="A member of lab_utils/rollouts/rewards: exact, format, length, code, judge, …"
    )
    weight: float = Field(1.0, description="Weight in the sum of rewards.")
    options: dict[str, Any] = Field({}, description="Arguments of that reward.")


class GrpoObjective(Section):
    kind: Literal["grpo"]
    loss: Literal["grpo", "gspo", "reinforce"] = Field(
        "grpo", description="Ratio of a token (grpo), of a sequence (gspo), or none (reinforce)."
    )
    normalisation: Literal["sequence", "token", "constant"] = Field(
        "token",
        description="The loss is a mean over answers of their tokens' means (sequence), over all tokens (token), or "
        "divided by answers × rollout.max_new_tokens (constant: Dr. GRPO).",
    )
    baseline: Literal["group_mean", "leave_one_out", "none"] = Field(
        "group_mean", description="What a reward is compared with (leave_one_out: RLOO)."
    )
    scale: Literal["group", "batch", "none"] = Field(
        "group", description="Standard deviation that advantages are divided by (none: Dr. GRPO)."
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="ε below a ratio of 1.")
    clip_high: float = Field(
        0.28, gt=0, description="ε above a ratio of 1 (clip-higher: more than clip_low)."
    )
    dual_clip: float | None = Field(
        None, gt=1, description="Largest ratio that counts where the advantage is negative; absent: no bound."
    )
    kl_weight: float = Field(0.0, ge=0, description="β of the KL to the reference; 0: no reference model.")
    kl_estimator: Literal["k1", "k2", "k3", "unbiased"] = Field(
        "unbiased",
        description="Estimator of the KL; unbiased: k3 times the ratio to the sampling policy (V3.2). k1 is refused: "
        "as a loss it teaches nothing.",
    )
    reference_source: str | None = Field(
        None,
        description="Weights of the reference, as model.source; absent: those that training starts from.",
    )
    sequence_mask: float | None = Field(
        None,
        gt=0,
        description="δ: an answer of negative advantage whose mean log(π_old/π) exceeds it is left out (V3.2).",
    )
    keep_routing: bool = Field(
        False, description="Experts chosen while sampling are taken again in training (MoE only)."
    )
    rewards: tuple[RewardSource, ...] = Field((RewardSource(),), min_length=1, description="Rewards, summed.")
    drop_uniform_groups: bool = Field(
        True, description="Leave out groups whose answers all have one reward: they teach nothing."
    )
    dynamic_sampling: int = Field(
        0, ge=0, description="Further rounds of prompts to replace groups of one reward (DAPO); 0: none."
    )
    updates_per_rollout: int = Field(1, ge=1, description="Optimizer steps that share one round of samples.")

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> GrpoObjective:
        if self.loss == "reinforce":
            _refuse_idle(
                self,
                dict.fromkeys(("clip_low", "clip_high", "dual_clip"), ("grpo", "gspo")),
                "loss",
                self.loss,
            )
        if self.kl_weight and self.kl_estimator == "k1":
            raise ValueError(
                "objective.kl_estimator=k1 measures the KL and cannot hold it: its gradient doesn't depend on the "
                "reference and averages to zero; choose unbiased, k2 or k3"
            )
        if not self.kl_weight:
            idle = {"kl_estimator": (), "reference_source": ()}
            _refuse_idle(self, idle, "kl_weight", "0")
        return self


class TeacherSource(Section):
    source: str = Field(description="Weights of the teacher, as model.source.")
    domains: tuple[str, ...] = Field(
        (), description="Families of prompts it teaches; none: all that no other does."
    )
    weight: float = Field(1.0, gt=0, description="w of its divergence in the loss.")


class DistillObjective(Section):
    kind: Literal["distill"]
    loss: Literal["reverse_kl", "forward_kl", "js", "sampled_token"] = Field(
        "reverse_kl",
        description="Divergence; sampled_token: reverse KL by the sampled tokens alone, high variance.",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher in js's mixture.")
    teachers: tuple[TeacherSource, ...] = Field(
        min_length=1, description="Teachers, each on its own domains."
    )
    on_policy: bool = Field(
        True, description="Learn on samples of the student; false: on the texts of data.train."
    )
    updates_per_rollout: int = Field(1, ge=1, description="Optimizer steps that share one round of samples.")

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> DistillObjective:
        _refuse_idle(self, {"beta": ("js",)}, "loss", self.loss)
        if self.loss == "sampled_token" and not self.on_policy:
            raise ValueError(
                "objective.loss=sampled_token needs samples of the student: set objective.on_policy=true"
            )
        if not self.on_policy:
            _refuse_idle(self, {"updates_per_rollout": ()}, "on_policy", "false")
        return self


Objective = Annotated[
    SftObjective | PreferenceObjective | RewardObjective | GrpoObjective | DistillObjective,
    Field(discriminator="kind"),
]


class RolloutSection(Section):
    """Samples of the model's own; read by grpo and on-policy distill."""

    source: Literal["in_process", "server"] = Field(
        "in_process", description="Who samples: the trained model itself, or an OpenAI-compatible server."
    )
    prompts: int = Field(16, ge=1, description="Prompts of a round.")
    group_size: int = Field(8, ge=1, description="Answers to a prompt.")
    max_new_tokens: int = Field(96, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(
        1.0, gt=0, description="Of sampling, and of the log-probabilities in training."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Tokens kept by probability mass (nucleus).")
    top_k: int = Field(0, ge=0, description="Tokens kept by rank; 0: all.")
    keep_sampling_mask: bool = Field(
        True,
        description="With top_p or top_k: training renormalises over the tokens kept while sampling (V3.2).",
    )
    slots: int = Field(64, ge=1, description="Answers that one rank samples at a time.")
    modes: tuple[Mode, ...] = Field(
        (), description="Reasoning modes of the prompts, in turn; none: data.mode."
    )
    length_budgets: dict[Mode, int] = Field({}, description="Longest answer by mode; absent: max_new_tokens.")
    length_penalty: dict[Mode, float] = Field(
        {}, description="By mode: reward taken off an answer of full length, in proportion to its length."
    )
    server: str | None = Field(None, description="http://HOST:PORT/v1 of the server.")
    server_model: str | None = Field(
        None, description="Model name that the server knows; absent: its only one."
    )
    reload: str | None = Field(
        None,
        description='URL that is posted {"path": …} when new weights are on disk; absent: it reads them itself.',
    )
    reload_every: int = Field(1, ge=1, description="Rounds between hand-overs of weights to the server.")
    gap_alarm: float = Field(
        0.1, gt=0, description="Mean |log-probability of sampler - of trainer| that raises an alarm, in nat."
    )

    @model_validator(mode="after")
    def _server_needs_an_address(self) -> RolloutSection:
        of = dict.fromkeys(("server", "server_model", "reload", "reload_every"), ("server",))
        _refuse_idle(self, of | {"slots": ("in_process",)}, "source", self.source, where="rollout")
        if self.source == "server" and not self.server:
            raise ValueError(
                "rollout.source is server, but rollout.server is empty: give http://HOST:PORT/v1"
            )
        return self


def _refuse_idle(
    section: Section, of: dict[str, tuple[str, ...]], key: str, value: str, *, where: str = "objective"
) -> None:
    """Fields set to something under a ``value`` of ``key`` that doesn't read them."""
    for name, readers in of.items():
        if value not in readers and getattr(section, name) != type(section).model_fields[name].default:
            advice = (
                f"set {where}.{key} to {' or '.join(readers)}, or leave it out" if readers else "leave it out"
            )
            raise ValueError(f"{where}.{name} would change nothing under {where}.{key}={value}: {advice}")
