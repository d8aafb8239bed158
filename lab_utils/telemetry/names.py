"""Every metric that Ascent logs: key, unit, section, meaning. jsonl, W&B, figures and the docs come from it.

Leaf names are TRL's wherever TRL has one. ``{fn}`` and the like stand for any one name; ``eval/`` repeats a
``train/`` leaf on held-out data. ``docs/metrics.md`` is made by ``python -m lab_utils.telemetry.names``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SECTIONS = ("Overview", "Alignment", "Throughput", "Chips", "Stability", "MoE", "Rollouts", "Evaluation")


@dataclass(frozen=True)
class MetricSpec:
    """One metric.

    Attributes:
        key: what stands in metrics.jsonl and W&B; ``{name}`` is a placeholder.
        unit: as written on an axis; ``1`` for a pure number, ``0–1`` for a share.
        section: where a dashboard shows it, one of ``SECTIONS``.
        meaning: one line.
        overview: also shown on the first page.
    """

    key: str
    unit: str
    section: str
    meaning: str
    overview: bool = False


# section -> (key, unit, meaning)
_TABLE: dict[str, tuple[tuple[str, str, str], ...]] = {
    "Overview": (
        ("train/global_step", "count", "Optimizer steps so far: the x-axis of every chart."),
        ("train/epoch", "count", "Passes over the training data so far."),
        ("train/num_tokens", "tokens", "Tokens trained on so far, padding left out."),
    ),
    "Alignment": (
        (
            "train/loss",
            "nat/token",
            "The objective's loss, a mean over the batch's loss tokens (in nat over pairs: preference, reward).",
        ),
        (
            "train/mean_token_accuracy",
            "0–1",
            "Share of loss tokens whose top-1 prediction is right (preference: of chosen answers'; distill: as the "
            "teacher's).",
        ),
        (
            "train/rewards/chosen",
            "nat",
            "β·log(π/π_ref) of the preferred completion; without a reference, β·log π.",
        ),
        ("train/rewards/rejected", "nat", "The same of the other completion."),
        ("train/rewards/margins", "nat", "Chosen minus rejected."),
        ("train/rewards/accuracies", "0–1", "Share of pairs with a positive margin."),
        (
            "train/logps/chosen",
            "nat",
            "Log-probability of the preferred completion, a sum over its tokens, mean over pairs.",
        ),
        ("train/logps/rejected", "nat", "The same of the other completion."),
        ("train/accuracy", "0–1", "Reward model: pairs that it orders rightly."),
        ("train/margin", "score", "Reward model: mean score gap of a pair."),
        ("train/min_reward", "score", "Reward model: smallest output of the batch."),
        ("train/mean_reward", "score", "Reward model: mean output of the batch."),
        ("train/max_reward", "score", "Reward model: largest output of the batch."),
        (
            "train/kl",
            "nat/token",
            "KL divergence to the reference; the recipe states the estimator (kto: z0, in nat/answer).",
        ),
        (
            "train/teacher_kl",
            "nat/token",
            "Distillation: the recipe's divergence from the teacher, unweighted.",
        ),
        (
            "train/teacher_kl/{teacher}",
            "nat/token",
            "The same on one teacher's tokens, by its place in the list.",
        ),
        ("train/reward", "score", "Weighted reward, mean over the batch."),
        ("train/reward_std", "score", "Standard deviation of the reward within a group, mean over groups."),
    ),
    "Throughput": (
        ("perf/step_time", "s", "Wall time of a step."),
        ("perf/tokens_per_s", "tokens/s", "Tokens trained a second, padding left out."),
        ("perf/tokens_per_s_per_chip", "tokens/s", "The same, by chip (on CPU: by rank)."),
        ("perf/mfu", "0–1", "Model FLOPs a second over the chips' peak; the config has the peak."),
        ("perf/tflops_per_chip", "TFLOP/s", "Model FLOPs a second, by chip."),
        ("perf/time/data", "s", "Part of a step spent waiting for rows."),
        ("perf/time/forward_backward", "s", "Part of a step in the forward and backward passes."),
        ("perf/time/optimizer", "s", "Part of a step in clipping and the optimizer."),
        ("perf/time/communication", "s", "Part of a step in collectives that nothing hides."),
        ("perf/time/generate", "s", "Part of a step that generates samples."),
        ("perf/time/weight_sync", "s", "Part of a step that hands weights to the sampler."),
        ("perf/time/checkpoint", "s", "Part of a step that saves."),
        ("perf/time/other", "s", "What remains of the step's wall time."),
        ("perf/padding_frac", "0–1", "Share of the rows' tokens that is padding."),
        ("perf/bubble_frac", "0–1", "Share of the step in which pipeline stages idle."),
        ("perf/straggler", "1", "Slowest rank's step time over the median."),
        ("perf/joules_per_token", "J/token", "Power of all packages over tokens a second, while training."),
    ),
    "Chips": (
        ("chip/util_mean", "%", "Use of the compute cores, mean over chips (on CPU: over ranks)."),
        ("chip/util_min", "%", "Use of the compute cores, the idlest chip (on CPU: rank)."),
        ("chip/hbm_frac", "0–1", "Memory in use as the driver sees it, fullest chip (on CPU: the host's)."),
        ("chip/power", "W", "Power, mean over the packages that report it."),
        ("chip/power_total", "W", "Power of all packages of the run together, as far as they report it."),
        (
            "chip/energy_kwh",
            "kWh",
            "Energy of all packages since the run began, attempts before a resume included.",
        ),
        ("chip/temp_max", "°C", "The hottest chip."),
        ("chip/unhealthy", "count", "Chips that report anything but good health."),
        ("chip/link_tx", "GB/s", "Interconnect, sent, by chip."),
        ("chip/link_rx", "GB/s", "Interconnect, received, by chip."),
        ("mem/allocated_peak", "GiB", "The allocator's peak, worst rank (on CPU: resident memory)."),
        ("mem/reserved_peak", "GiB", "Peak that the allocator held, worst rank."),
        ("mem/peak_frac", "0–1", "Peak over the chip's capacity, worst rank."),
        ("mem/alloc_retries", "count", "Allocations that had to flush the cache first."),
    ),
    "Stability": (
        ("train/grad_norm", "1", "Global L2 norm of the gradient before clipping."),
        ("train/learning_rate", "1", "Learning rate of the main parameter group."),
        ("train/entropy", "nat", "Entropy of the predictions on loss tokens."),
        ("train/skipped_steps", "count", "Steps dropped so far because a number was not finite."),
        ("train/indexer_kl", "nat/query", "KL loss that trains the lightning indexer (V4)."),
        ("train/policy_loss", "nat/token", "The policy's part of the loss."),
        (
            "train/aux_loss",
            "1",
            "Balance loss of the experts, mean over documents and layers; 1 if even (V4).",
        ),
        ("train/mtp_loss", "nat/token", "Multi-token-prediction part of the loss."),
        ("train/mtp_token_accuracy", "0–1", "Share of loss tokens that multi-token prediction hits."),
        ("train/clip_ratio/low_mean", "0–1", "Tokens clipped at the lower ratio bound."),
        ("train/clip_ratio/low_min", "0–1", "The same, of the answer with the fewest."),
        ("train/clip_ratio/high_mean", "0–1", "Tokens clipped at the upper ratio bound."),
        ("train/clip_ratio/high_max", "0–1", "The same, of the answer with the most."),
        ("train/clip_ratio/region_mean", "0–1", "Tokens clipped at either bound."),
        ("train/sampling/sampling_logp_difference/mean", "nat", "Sampler against trainer, same tokens."),
        ("train/sampling/sampling_logp_difference/max", "nat", "The same, largest."),
        (
            "train/sampling/importance_sampling_ratio/min",
            "1",
            "Trainer's over sampler's probability, smallest.",
        ),
        ("train/sampling/importance_sampling_ratio/mean", "1", "The same, mean; measured, not applied."),
        ("train/sampling/importance_sampling_ratio/max", "1", "The same, largest."),
        (
            "train/masked_sequences",
            "0–1",
            "Answers left out by the sequence mask: too far from their policy.",
        ),
    ),
    "MoE": (
        ("moe/cv_mean", "1", "Standard deviation over mean of the experts' load, mean over layers."),
        ("moe/cv_max", "1", "The same, worst layer."),
        ("moe/max_violation", "1", "Largest load over the mean, minus 1, worst layer."),
        ("moe/dead_expert_frac_mean", "0–1", "Experts that no token of the batch reached, mean over layers."),
        ("moe/expert_diversity_mean", "0–1", "exp(entropy of the load) over the number of experts."),
        ("moe/bias_norm", "1", "Norm of a router's correction bias, mean over layers."),
    ),
    "Rollouts": (
        ("train/rewards/{fn}/mean", "score", "One reward function, mean."),
        (
            "train/rewards/{fn}/std",
            "score",
            "One reward function, standard deviation within a group, mean over groups.",
        ),
        ("train/frac_reward_zero_std", "0–1", "Groups whose rewards are all equal: no signal."),
        ("train/completions/mean_length", "tokens", "Length of completions, mean."),
        ("train/completions/min_length", "tokens", "Length of completions, shortest."),
        ("train/completions/max_length", "tokens", "Length of completions, longest."),
        ("train/completions/mean_terminated_length", "tokens", "Of those that ended, mean."),
        ("train/completions/min_terminated_length", "tokens", "Of those that ended, shortest."),
        ("train/completions/max_terminated_length", "tokens", "Of those that ended, longest."),
        ("train/completions/clipped_ratio", "0–1", "Completions cut at the length limit."),
        ("rollout/staleness", "steps", "Age of the weights that the samples came from."),
        ("rollout/tokens_per_s", "tokens/s", "Tokens generated a second."),
    ),
    "Evaluation": (
        ("eval/loss", "nat/token", "The objective's loss on held-out data."),
        ("eval/mean_token_accuracy", "0–1", "Top-1 hits on held-out loss tokens."),
        ("eval/{leaf}", "as train/{leaf}", "Any other training leaf, on held-out data."),
        ("eval/exact_match", "0–1", "Held-out questions whose greedy answer the verifier accepts."),
        ("eval/exact_match/{family}", "0–1", "The same, of one family."),
        ("eval/refusal_rate", "0–1", "Unsafe questions that are refused, with nothing after the refusal."),
        ("eval/over_refusal_rate", "0–1", "Harmless questions of the family safety that are refused."),
        ("eval/completions/mean_length", "tokens", "Length of the answers to held-out questions, mean."),
        ("eval/completions/clipped_ratio", "0–1", "Of them, those cut at the length limit."),
        ("eval/{bench}/score", "0–1", "A benchmark's score."),
    ),
}
# Also on the first page of a dashboard.
_OVERVIEW = (
    "train/loss",
    "train/rewards/margins",
    "train/kl",
    "train/reward",
    "perf/tokens_per_s",
    "perf/mfu",
    "chip/util_mean",
    "eval/loss",
)

METRICS: dict[str, MetricSpec] = {
    key: MetricSpec(key, unit, section, meaning, key in _OVERVIEW)
    for section, rows in _TABLE.items()
    for key, unit, meaning in rows
}
_PATTERNS = {
    re.compile("[^/]+".join(re.escape(part) for part in re.split(r"\{\w+\}", key))): spec
    for key, spec in METRICS.items()
    if "{" in key and key != "eval/{leaf}"
}


def lookup(key: str) -> MetricSpec | None:
    """The metric behind a logged key, placeholders filled in; None for a key that nobody has described."""
    if key in METRICS:
        return METRICS[key]
    found = next((spec for pattern, spec in _PATTERNS.items() if pattern.fullmatch(key)), None)
    # A leaf of eval/ means what it means in train/: one that train/ doesn't have is unknown.
    if found is None and key.startswith("eval/") and lookup(key.replace("eval/", "train/", 1)):
        return METRICS["eval/{leaf}"]
    return found


def markdown() -> str:
    """The content of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Made by `python -m lab_utils.telemetry.names > docs/metrics.md`; edit that module, not this page.",
        "The x-axis is `train/global_step`. `{…}` stands for any one name. ★ = also on the overview page.",
    ]
    for section in SECTIONS:
        specs = [spec for spec in METRICS.values() if spec.section == section]
        lines += ["", f"## {section}", "", "| Key | Unit | Meaning |", "|---|---|---|"]
        lines += [f"| `{s.key}`{' ★' if s.overview else ''} | {s.unit} | {s.meaning} |" for s in specs]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
