"""From answers and likelihoods to the measures of a report: pure functions, no model, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lab_utils.evaluation import statistics
from lab_utils.evaluation.answering import benign, is_refused, is_right, is_unsafe
from lab_utils.evaluation.held_out import HeldOut
from lab_utils.evaluation.likelihood import Likelihood, PairLikelihood
from lab_utils.evaluation.statistics import Measure
from lab_utils.rollouts.rewards import Answer

KEYS = (
    "exact_match",
    "pass_at_k",
    "refusal_rate",
    "over_refusal_rate",
    "perplexity",
    "preference_accuracy",
    "reward_accuracy",
    "completion_length",
    "clipped_ratio",
)


@dataclass
class Findings:
    """What one model did with the held-out rows.

    Attributes:
        answers: by mode, one a question.
        drawn: in the first mode, several a question; empty: none were drawn.
        texts: by manifest of format messages or text, one a document.
        pairs: by preference manifest, one a row.
    """

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    drawn: list[list[Answer]] = field(default_factory=list)
    texts: dict[str, list[Likelihood]] = field(default_factory=dict)
    pairs: dict[str, list[PairLikelihood]] = field(default_factory=dict)


@dataclass(frozen=True)
class Questions:
    """All questions of all prompt manifests, one behind the other."""

    rows: list[dict[str, Any]]
    families: list[str]
    sources: list[str]

    @classmethod
    def of(cls, held: Sequence[HeldOut]) -> Questions:
        asked = [h for h in held if h.format == "prompt"]
        return cls(
            [row for h in asked for row in h.rows],
            [family for h in asked for family in h.families],
            [h.name for h in asked for _ in h.rows],
        )


def scores(
    held: Sequence[HeldOut], found: Findings, *, ks: Sequence[int] = (), reference: Findings | None = None
) -> dict[str, Any]:
    """Every measure of KEYS, None where the held-out rows don't give it; ``by_mode`` where several modes were asked.

    Args:
        held: the rows that ``found`` is about.
        found: one model's.
        ks: of pass@k; ``found.drawn`` holds at least the largest.
        reference: of π_ref, for ``reward_accuracy``.
    """
    questions = Questions.of(held)
    modes = {mode: answer_measures(questions, answers) for mode, answers in found.answers.items()}
    first = next(iter(modes.values()), answer_measures(questions, []))
    result = first | {
        "pass_at_k": pass_at_k(questions, found.drawn, ks),
        "perplexity": perplexity(held, found.texts),
        "preference_accuracy": preference_accuracy(held, found.pairs),
        "reward_accuracy": reward_accuracy(held, found.pairs, reference.pairs) if reference else None,
    }
    result = {key: result[key] for key in KEYS}
    return result | ({"by_mode": modes} if len(modes) > 1 else {})


def answer_measures(questions: Questions, answers: Sequence[Answer]) -> dict[str, Measure | None]:
    """Measures of one greedy answer a question; all None where there are no answers."""

    def over(indices: Sequence[int], value: Any) -> tuple[list[Any], list[str]]:
        return [value(i) for i in indices], [questions.families[i] for i in indices]

    rows, everyone = questions.rows, range(len(answers))
    checked = [i for i in everyone if rows[i].get("verify")]
    refused = [is_refused(row, answer.text) for row, answer in zip(rows, answers)]
    unsafe = [i for i in everyone if is_unsafe(rows[i])]
    harmless = benign(rows) if answers else []
    return {
        "exact_match": statistics.proportion(*over(checked, lambda i: is_right(rows[i], answers[i].text))),
        "refusal_rate": statistics.proportion(*over(unsafe, lambda i: refused[i])),
        "over_refusal_rate": statistics.proportion(*over(harmless, lambda i: refused[i])),
        "completion_length": statistics.mean(*over(everyone, lambda i: float(len(answers[i].tokens)))),
        "clipped_ratio": statistics.proportion(*over(everyone, lambda i: not answers[i].finished)),
    }


def pass_at_k(questions: Questions, drawn: Sequence[Sequence[Answer]], ks: Sequence[int]) -> Measure | None:
    """pass@k of the largest k, with every k under ``by_k``."""
    checked = [i for i, row in enumerate(questions.rows) if row.get("verify")] if drawn else []
    if not checked or not ks:
        return None
    right = [sum(bool(is_right(questions.rows[i], a.text)) for a in drawn[i]) for i in checked]
    families = [questions.families[i] for i in checked]
    by_k = {k: statistics.mean_pass_at_k(right, len(drawn[0]), k, families) for k in sorted(ks)}
    largest = max(by_k)
    return {
        "k": largest,
        "samples": len(drawn[0]),
        **by_k[largest],
        "by_k": {str(k): m for k, m in by_k.items()},
    }


def perplexity(held: Sequence[HeldOut], texts: dict[str, list[Likelihood]]) -> Measure | None:
    """Over the documents of all manifests together; ``by_manifest`` where there are several."""
    parts = {h.label: (h, texts[h.label]) for h in held if h.label in texts}

    def over(chosen: Sequence[tuple[HeldOut, list[Likelihood]]]) -> Measure | None:
        kept = [(x, f) for h, found in chosen for x, f in zip(found, h.families) if x.tokens]
        return statistics.perplexity(
            [-x.logp for x, _ in kept], [x.tokens for x, _ in kept], [family for _, family in kept]
        )

    found = over(list(parts.values()))
    if found and len(parts) > 1:
        found["by_manifest"] = {name: over([part]) for name, part in parts.items()}
    return found


def preference_accuracy(held: Sequence[HeldOut], pairs: dict[str, list[PairLikelihood]]) -> Measure | None:
    """Share of pairs whose chosen answer has the higher summed log-probability; by its mean a token under
    ``length_normalised``."""
    return _pair_measure(held, pairs, lambda name, i: _gaps(pairs[name][i]))


def reward_accuracy(
    held: Sequence[HeldOut],
    pairs: dict[str, list[PairLikelihood]],
    reference: dict[str, list[PairLikelihood]],
) -> Measure | None:
    """Share of pairs with log(π/π_ref) higher for the chosen answer: the sign of DPO's reward margin at any β."""

    def gaps(name: str, i: int) -> tuple[float, float]:
        own, other = _gaps(pairs[name][i]), _gaps(reference[name][i])
        return own[0] - other[0], own[1] - other[1]

    return _pair_measure(held, {n: p for n, p in pairs.items() if n in reference}, gaps)


def _gaps(pair: PairLikelihood) -> tuple[float, float]:
    """Chosen minus rejected, in nat: of the sums, and of the means a token."""
    c, r = pair.chosen, pair.rejected
    return c.logp - r.logp, c.logp / max(c.tokens, 1.0) - r.logp / max(r.tokens, 1.0)


def _pair_measure(
    held: Sequence[HeldOut], pairs: dict[str, list[PairLikelihood]], gaps: Any
) -> Measure | None:
    labels = [h for h in held if h.label in pairs]
    families = [family for h in labels for family in h.families]
    found = [gaps(h.label, i) for h in labels for i in range(len(h.rows))]
    summed = statistics.proportion([gap > 0 for gap, _ in found], families)
    return summed and summed | {
        "length_normalised": statistics.proportion([gap > 0 for _, gap in found], families),
        "margin": statistics.mean([gap for gap, _ in found], families),
    }


def notes(held: Sequence[HeldOut], *, samples: int, base: bool, reference: bool) -> dict[str, str]:
    """Why measures are None, by key."""
    formats = {h.format for h in held if h.rows}
    questions = Questions.of(held)
    checked = any(row.get("verify") for row in questions.rows)
    unsafe = [is_unsafe(row) for row in questions.rows]
    found: dict[str, str] = {}
    if "prompt" not in formats:
        asks = (
            "exact_match",
            "pass_at_k",
            "refusal_rate",
            "over_refusal_rate",
            "completion_length",
            "clipped_ratio",
        )
        found |= dict.fromkeys(asks, "No manifest of format prompt (questions) was given.")
    else:
        if not checked:
            found |= dict.fromkeys(
                ("exact_match", "pass_at_k"), "No question says how its answer is verified."
            )
        elif not samples:
            found["pass_at_k"] = "No answers were sampled: give --samples."
        if not any(unsafe):
            found["refusal_rate"] = "No question is marked as one to be refused (verify.kind refuse)."
        elif all(unsafe):
            found["over_refusal_rate"] = "Every question is one to be refused."
    if not formats & {"messages", "text"}:
        found["perplexity"] = "No manifest of format messages or text was given."
    if "preference" not in formats:
        found |= dict.fromkeys(
            ("preference_accuracy", "reward_accuracy"), "No manifest of format preference was given."
        )
    elif not reference:
        found["reward_accuracy"] = "There is no reference: give --base or --reference."
    if not base:
        found["base"] = "No base: the target is no run's, or --no-base was given; name one with --base."
    return found
