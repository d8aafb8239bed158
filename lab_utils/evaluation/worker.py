"""Ask a model questions and check the answers, in a process of its own: ``python -m lab_utils.evaluation.worker``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lab_utils.errors import DataError, LabError, RunError
from lab_utils.evaluation.report import REPORT

NEW_TOKENS = 96  # the longest right answer, a tool call with two arguments, takes 70 or so


def load_questions(manifest: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    """Rows of a verified prompt manifest; with ``limit``, spread evenly over the task families.

    Raises:
        DataError: the manifest is not of format ``prompt``, or a checksum does not match.
    """
    from lab_utils.data.manifest import load_manifest

    source = load_manifest(manifest)
    if source.format != "prompt":
        raise DataError(
            f"{source.name} has format {source.format}, but questions need format prompt: see lab data list."
        )
    rows = list(source.rows(split))
    if limit is None or limit >= len(rows):
        return rows
    by_family: dict[str, list] = {}
    for row in rows:
        by_family.setdefault(row["verify"]["family"], []).append(row)
    spread, depth = [], 0
    while len(spread) < limit:
        spread += [family[depth] for family in by_family.values() if depth < len(family)]
        depth += 1
    return spread[:limit]


def ask(model: Any, encoding: Any, questions: list[dict[str, Any]]) -> list[str]:
    """Greedy answers, one a question, without the end token.

    Args:
        model: a TrainableModel; it is put into evaluation mode and back.
        encoding: the ``Encoding`` of the recipe: tokenizer, mode, fixed texts.
        questions: rows with ``messages`` and, for tool calls, ``tools``.
    """
    from lab_utils.models.generate import greedy_generate

    tokenizer = encoding.tokenizer
    prompts = [encoding.prompt_ids(row) for row in questions]
    training = model.training
    model.eval()
    generated = greedy_generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_id=tokenizer.eos_id)
    model.train(training)
    return [tokenizer.decode(ids) for ids in generated]


def compare(questions: list[dict[str, Any]], answers: dict[str, list[str]]) -> dict[str, Any]:
    """Exact match overall and by family for each stage (``before``, ``after``), and the answers side by side."""
    from lab_utils.data.tasks._base import verify_row

    verdicts = {
        stage: [verify_row(q, a) for q, a in zip(questions, texts)] for stage, texts in answers.items()
    }
    families = sorted({q["verify"]["family"] for q in questions})
    of_family = {f: [i for i, q in enumerate(questions) if q["verify"]["family"] == f] for f in families}

    def share(stage: str, indices: list[int]) -> float:
        return sum(verdicts[stage][i] for i in indices) / len(indices)

    everything = list(range(len(questions)))
    return {
        "n": len(questions),
        "exact_match": {stage: share(stage, everything) for stage in answers},
        "by_family": {
            f: {"n": len(indices), **{stage: share(stage, indices) for stage in answers}}
            for f, indices in of_family.items()
        },
        "samples": [
            {
                "family": q["verify"]["family"],
                "question": q["messages"][-1]["content"],
                "expected": q["verify"]["expected"],
                **{stage: texts[i] for stage, texts in answers.items()},
                **{f"{stage}_ok": verdicts[stage][i] for stage in answers},
            }
            for i, q in enumerate(questions)
        ],
    }


def report(path: Path, manifest: str, split: str, limit: int | None) -> dict[str, Any]:
    """The report of a run: its start weights beside its last complete checkpoint; written by rename."""
    import torch

    from lab_utils.data.documents import encoding_of
    from lab_utils.models.load import load_model
    from lab_utils.runs.directory import RunDirectory

    run = RunDirectory(path)
    checkpoints = run.checkpoints()
    if not checkpoints:
        raise RunError(
            f"{path.name} has no complete checkpoint to evaluate: let it save one (schedule.save_every)."
        )
    recipe = run.recipe
    questions = load_questions(manifest, split, limit)
    encoding = encoding_of(recipe)
    started, answers = time.time(), {}
    for stage, source in (("before", recipe.model.source), ("after", str(checkpoints[-1] / "model"))):
        model = load_model(source, dtype=torch.float32, seed=recipe.seed)
        answers[stage] = ask(model, encoding, questions)
        print(f"{stage}: {len(questions)} questions answered, {time.time() - started:.0f} s", flush=True)
    result = {
        "run": path.name,
        "manifest": manifest,
        "split": split,
        "checkpoint": checkpoints[-1].name,
        "max_new_tokens": NEW_TOKENS,
        **compare(questions, answers),
        "seconds": time.time() - started,
    }
    staged = path / f".{REPORT}.{os.getpid()}"
    staged.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    staged.rename(path / REPORT)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--on", required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    try:
        report(args.run, args.on, args.split, args.limit)
    except LabError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
