"""One evaluation in a process of its own: ``python -m lab_utils.evaluation.worker PLAN.json OUT_FOLDER``.

One model is in memory at a time. Lines that begin with PROGRESS are for whoever waits.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab_utils.accelerators._hidden import show_devices
from lab_utils.errors import CheckpointError, LabError
from lab_utils.evaluation.held_out import HeldOut, load_held_out, spread
from lab_utils.evaluation.plan import Plan
from lab_utils.evaluation.report import PAGE, PROGRESS, REPORT, VERSION
from lab_utils.evaluation.targets import Target
from lab_utils.runs.directory import write_atomic

SHOWN = 2000  # most answers kept in a report, questions × modes
ASK_TOKENS, CHUNK = 512, 256  # longest reply of a judge; questions between two lines of progress


def evaluate_plan(plan: Plan) -> dict[str, Any]:
    """The report of a plan: see ``report`` for its structure.

    Raises:
        LabError: data, weights or a device that are not what they should be.
    """
    from lab_utils.evaluation.pairwise import exact_verdicts, win_rate
    from lab_utils.evaluation.scores import Questions, notes, scores

    started = time.time()
    held = [load_held_out(spec, limit=plan.limit) for spec in plan.on]
    questions = Questions.of(held)
    found = {"target": study(plan.target, plan, held, "target")}
    if plan.base:
        found["base"] = study(plan.base, plan, held, "base")
    reference = found.get("base")
    if plan.reference and plan.reference != plan.base and any(h.format == "preference" for h in held):
        reference = study(plan.reference, plan, [h for h in held if h.format == "preference"], "reference")
    verdicts: list[Any] = []
    judge: dict[str, Any] = {"judge": "exact"}
    if plan.against and questions.rows:
        found["against"] = study(plan.against, plan, [h for h in held if h.format == "prompt"], "against")
        ours, theirs = (found[side].answers[plan.modes[0]] for side in ("target", "against"))
        if plan.judge:
            verdicts, silent = judged(plan, questions.rows, ours, theirs)
            judge = {"judge": plan.judge.name, "without_verdict": silent}
        else:
            verdicts = exact_verdicts(questions.rows, ours, theirs)
    beside = {"base": plan.base, "against": plan.against, "reference": plan.reference or plan.base}
    why = notes(held, samples=plan.samples, base=bool(plan.base), reference=bool(reference))
    own = scores(held, found["target"], ks=plan.ks, reference=reference)
    base = scores(held, found["base"], ks=plan.ks) if plan.base else None
    wins = win_rate(verdicts, questions.families) if verdicts else None
    if plan.against and not wins:
        why["win_rate"] = (
            "No question could be judged: give a manifest of format prompt with verify, or a --judge."
        )
    samples, left_out = sample_rows(plan, questions, found, verdicts)
    return {
        "version": VERSION,
        "target": named(plan.target),
        **own,
        "win_rate": wins and wins | judge | {"against": plan.against.name},
        "base": base and named(plan.base) | base,
        "notes": why,
        "manifests": [h.describe() for h in held],
        "settings": {
            "modes": list(plan.modes),
            "budgets": dict(zip(plan.modes, plan.budgets)),
            **{name: getattr(plan, name) for name in ("limit", "samples", "temperature", "dtype", "seed")},
            **{role: target and target.name for role, target in beside.items()},
        },
        "samples_left_out": left_out,
        "samples": samples,
        "seconds": time.time() - started,
    }


def named(target: Target) -> dict[str, Any]:
    return {"name": target.name, "source": target.source, "checkpoint": target.checkpoint}


# -- one model -----------------------------------------------------------------------------------------------


@contextmanager
def loaded(target: Target, plan: Plan) -> Iterator[Any]:
    """The model of a target in evaluation mode; its memory is free again afterwards."""
    import torch

    from lab_utils.accelerators import get_accelerator
    from lab_utils.models.load import REWARD_MODEL, load_config, load_model

    if REWARD_MODEL in (load_config(target.source).architectures or []):
        raise CheckpointError(
            f"{target.name} is a reward model, which scores answers and writes none: evaluate a language model."
        )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    device = get_accelerator(plan.accelerator).setup(threads=int(threads) if threads.isdigit() else None)
    model = load_model(target.source, dtype=getattr(torch, plan.dtype), device=device, seed=target.seed)
    yield model.eval()
    del model
    gc.collect()


def study(target: Target, plan: Plan, held: list[HeldOut], role: str) -> Any:
    """Answers and likelihoods of one model: ``Findings``."""
    from lab_utils.evaluation.answering import ask, draw
    from lab_utils.evaluation.likelihood import pair_likelihoods, text_likelihoods
    from lab_utils.evaluation.scores import Findings, Questions

    questions = Questions.of(held).rows
    found = Findings()
    encoding = target.encoding()
    started = time.time()

    def tell(what: str) -> None:
        print(f"{PROGRESS}{role} {target.name}: {what}, {time.time() - started:.0f} s", flush=True)

    with loaded(target, plan) as model:
        for mode in plan.modes if questions else ():
            found.answers[mode] = _in_chunks(
                questions,
                lambda some, mode=mode: ask(model, encoding, some, mode=mode, budget=plan.budget(mode)),
                lambda n, mode=mode: tell(f"{n} of {len(questions)} questions answered in mode {mode}"),
            )
        if plan.samples and questions and role in ("target", "base"):
            mode = plan.modes[0]
            options = {"samples": plan.samples, "temperature": plan.temperature, "seed": plan.seed}
            found.drawn = _in_chunks(
                questions,
                lambda some: draw(model, encoding, some, mode=mode, budget=plan.budget(mode), **options),
                lambda n: tell(f"{plan.samples} samples of {n} of {len(questions)} questions"),
            )
        for part in held:
            if part.format in ("messages", "text"):
                found.texts[part.label] = text_likelihoods(
                    model, encoding, part.rows, part.format, row_tokens=plan.row_tokens
                )
            elif part.format == "preference":
                found.pairs[part.label] = pair_likelihoods(
                    model, encoding, part.rows, row_tokens=plan.row_tokens
                )
            else:
                continue
            tell(f"{len(part.rows)} rows of {part.label} read")
    return found


def _in_chunks(
    items: list[Any], work: Callable[[list[Any]], list[Any]], tell: Callable[[int], None]
) -> list[Any]:
    done: list[Any] = []
    while len(done) < len(items):
        done += work(items[len(done) : len(done) + CHUNK])
        tell(len(done))
    return done


def judged(
    plan: Plan, rows: list[dict[str, Any]], ours: list[Any], theirs: list[Any]
) -> tuple[list[str], float]:
    """Verdicts of the generative judge on each question, both orders asked, and the share of replies without one."""
    from lab_utils.evaluation.answering import ask
    from lab_utils.rollouts.judge import compare, parse_verdict

    encoding = plan.judge.encoding()
    said: list[str] = []
    with loaded(plan.judge, plan) as model:

        def replies(conversations: list[list[dict[str, Any]]]) -> list[str]:
            asked = [{"messages": messages} for messages in conversations]
            answers = _in_chunks(
                asked,
                lambda some: ask(model, encoding, some, budget=ASK_TOKENS),
                lambda n: print(
                    f"{PROGRESS}judge {plan.judge.name}: {n} of {len(asked)} replies", flush=True
                ),
            )
            said.extend(answer.text for answer in answers)
            return said

        verdicts = compare(replies, rows, [a.text for a in ours], [a.text for a in theirs])
    return verdicts, sum(parse_verdict(reply) is None for reply in said) / len(said)


# -- samples -------------------------------------------------------------------------------------------------


def sample_rows(
    plan: Plan, questions: Any, found: dict[str, Any], verdicts: list[Any]
) -> tuple[list[Any], int]:
    """Questions with the answers of every side, mode by mode, and how many were left out for the report's size."""
    from lab_utils.evaluation.answering import is_right

    numbered = [{"i": i, "family": family} for i, family in enumerate(questions.families)]
    chosen = [entry["i"] for entry in spread(numbered, "", max(1, SHOWN // len(plan.modes)))]

    def answer(side: str, mode: str, i: int) -> dict[str, Any]:
        given, row = found[side].answers[mode][i], questions.rows[i]
        return {
            "text": given.text,
            "reasoning": given.reasoning,
            "tokens": len(given.tokens),
            "finished": given.finished,
            "ok": is_right(row, given.text),
        }

    samples = []
    for mode in plan.modes:
        for i in chosen:
            row = questions.rows[i]
            sample = {
                "family": questions.families[i],
                "manifest": questions.sources[i],
                "mode": mode,
                "messages": row["messages"],
                "expected": (row.get("verify") or {}).get("expected"),
                **{side: answer(side, mode, i) for side in found},
            }
            if row.get("tools"):
                sample["tools"] = row["tools"]
            first = mode == plan.modes[0]
            if verdicts and first:
                sample["verdict"] = verdicts[i]
            if first and (drawn := found["target"].drawn) and row.get("verify"):
                right = sum(bool(is_right(row, a.text)) for a in drawn[i])
                sample["drawn"] = {"right": right, "of": len(drawn[i])}
            samples.append(sample)
    return samples, (len(questions.rows) - len(chosen)) * len(plan.modes)


# -- process -------------------------------------------------------------------------------------------------


def main() -> None:
    plan, out = Plan.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    try:
        report = evaluate_plan(plan)
    except LabError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)
    from lab_utils.evaluation.page import samples_page

    if report["samples"]:
        write_atomic(out / PAGE, samples_page(report))
    write_atomic(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    show_devices()
    main()
