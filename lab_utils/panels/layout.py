"""The dashboard as data: which metrics stand together, under which title, in which section.

Figures (``panels/figures.py``), the workspace of W&B and the live view draw from this one list. Units and meanings are
those of ``telemetry/names.py``; imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

SECTIONS = ("Overview", "Alignment", "Throughput", "Chips", "Stability", "MoE", "Rollouts", "Evaluation")


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: what a reader sees above it.
        keys: metrics drawn as lines, in this order; those that a run didn't log are left out.
        unit: label of the vertical axis.
        section: one of ``SECTIONS``.
        kind: ``line``, ``area`` (stacked parts of a whole), ``log`` (logarithmic vertical axis where every value is
            positive) or ``exact`` (a line without smoothing: nothing noisy about it).
        scale: factor from the logged unit to the drawn one, as 100 for a share drawn in percent.
    """

    title: str
    keys: tuple[str, ...]
    unit: str
    section: str
    kind: str = "line"
    scale: float = 1.0


PANELS = (
    Panel("Alignment loss", ("train/loss", "eval/loss"), "nat / token", "Alignment", kind="log"),
    Panel(
        "Token accuracy",
        ("train/mean_token_accuracy", "eval/mean_token_accuracy"),
        "%",
        "Alignment",
        scale=100,
    ),
    Panel("Implicit rewards", ("train/rewards/chosen", "train/rewards/rejected"), "nat", "Alignment"),
    Panel("Reward margin", ("train/rewards/margins", "eval/rewards/margins"), "nat", "Alignment"),
    Panel(
        "Pairs with a positive margin",
        ("train/rewards/accuracies", "eval/rewards/accuracies"),
        "%",
        "Alignment",
        scale=100,
    ),
    Panel(
        "Log-probability of the answers", ("train/logps/chosen", "train/logps/rejected"), "nat", "Alignment"
    ),
    Panel("Verified reward", ("train/reward", "train/reward_std"), "score", "Alignment"),
    Panel("Divergence from the reference", ("train/kl", "eval/kl"), "nat / token", "Alignment"),
    Panel("Divergence from the teachers", ("train/teacher_kl",), "nat / token", "Alignment", kind="log"),
    Panel("Throughput", ("perf/tokens_per_s",), "tokens / s", "Throughput"),
    Panel("Model FLOPs utilisation", ("perf/mfu",), "% of measured peak", "Throughput", scale=100),
    Panel(
        "Step time",
        (
            "perf/time/data",
            "perf/time/generate",
            "perf/time/weight_sync",
            "perf/time/forward_backward",
            "perf/time/optimizer",
            "perf/time/checkpoint",
            "perf/time/other",
        ),
        "s / step",
        "Throughput",
        kind="area",
    ),
    Panel("Energy of a token", ("perf/joules_per_token",), "J / token", "Throughput"),
    Panel("Chip utilisation", ("chip/util_mean", "chip/util_min"), "%", "Chips"),
    Panel("Memory, worst rank", ("mem/allocated_peak",), "GiB", "Chips"),
    Panel("Memory, fullest chip", ("chip/hbm_frac",), "%", "Chips", scale=100),
    Panel("Power of a package", ("chip/power",), "W", "Chips"),
    Panel("Energy so far", ("chip/energy_kwh",), "kWh", "Chips", kind="exact"),
    Panel("Hottest chip", ("chip/temp_max",), "°C", "Chips"),
    Panel("Chips in bad health", ("chip/unhealthy",), "chips", "Chips", kind="exact"),
    Panel("Gradient norm", ("train/grad_norm",), "L2", "Stability", kind="log"),
    Panel("Learning rate", ("train/learning_rate",), "learning rate", "Stability", kind="exact"),
    Panel("Entropy of the predictions", ("train/entropy",), "nat", "Stability"),
    Panel(
        "Tokens clipped",
        ("train/clip_ratio/low_mean", "train/clip_ratio/high_mean"),
        "%",
        "Stability",
        kind="exact",
        scale=100,
    ),
    Panel(
        "Sampler against trainer",
        ("train/sampling/sampling_logp_difference/mean", "train/sampling/sampling_logp_difference/max"),
        "nat / token",
        "Stability",
        kind="log",
    ),
    Panel("Indexer KL loss", ("train/indexer_kl",), "nat / query", "Stability"),
    Panel("Multi-token prediction loss", ("train/mtp_loss",), "nat / token", "Stability", kind="log"),
    Panel("Multi-token prediction hits", ("train/mtp_token_accuracy",), "%", "Stability", scale=100),
    Panel("Steps skipped", ("train/skipped_steps",), "steps", "Stability"),
    Panel("Spread of the experts' load", ("moe/cv_mean", "moe/cv_max"), "standard deviation / mean", "MoE"),
    Panel("Largest load of an expert", ("moe/max_violation",), "load / mean - 1", "MoE"),
    Panel("Experts without a token", ("moe/dead_expert_frac_mean",), "%", "MoE", scale=100),
    Panel("Balance loss of the experts", ("train/aux_loss",), "1 = even", "MoE"),
    Panel("Norm of the routers' bias", ("moe/bias_norm",), "L2", "MoE", kind="exact"),
    Panel(
        "Length of answers",
        ("train/completions/mean_length", "train/completions/max_length"),
        "tokens",
        "Rollouts",
    ),
    Panel("Answers cut at the limit", ("train/completions/clipped_ratio",), "%", "Rollouts", scale=100),
    Panel("Groups that teach nothing", ("train/frac_reward_zero_std",), "%", "Rollouts", scale=100),
    Panel("Sampling speed", ("rollout/tokens_per_s",), "tokens / s", "Rollouts"),
    Panel("Held-out answers right", ("eval/exact_match",), "%", "Evaluation", scale=100),
    Panel(
        "Refusals of held-out questions",
        ("eval/refusal_rate", "eval/over_refusal_rate"),
        "%",
        "Evaluation",
        scale=100,
    ),
)

# The nine that tell how a run went, for a page of a report.
OVERVIEW = (
    "Alignment loss",
    "Token accuracy",
    "Throughput",
    "Model FLOPs utilisation",
    "Step time",
    "Chip utilisation",
    "Gradient norm",
    "Learning rate",
    "Indexer KL loss",
)


def panels(section: str | None = None) -> list[Panel]:
    """The panels of a section, or all."""
    return [panel for panel in PANELS if section in (None, panel.section)]


# What each kind of alignment is steered by, for its page.
ALIGNMENT = {
    "preference": (
        "Alignment loss",
        "Reward margin",
        "Pairs with a positive margin",
        "Implicit rewards",
        "Log-probability of the answers",
        "Gradient norm",
    ),
    "grpo": (
        "Verified reward",
        "Held-out answers right",
        "Groups that teach nothing",
        "Length of answers",
        "Entropy of the predictions",
        "Divergence from the reference",
        "Tokens clipped",
        "Sampler against trainer",
        "Step time",
    ),
    "distill": (
        "Divergence from the teachers",
        "Token accuracy",
        "Held-out answers right",
        "Length of answers",
        "Entropy of the predictions",
        "Step time",
    ),
}
