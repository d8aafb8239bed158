"""``lab bench quality``: our engine beside a plain transformers Trainer, on the same base, data and token budget.

The plain loop is what a user would write without Ascent: transformers' own DeepSeek-V4, one example a row, padded on
the right to the longest of the batch, the Trainer's AdamW and cosine schedule with the recipe's own numbers. Its
batches hold as many examples as ours hold on average, so that both see the same tokens in the same number of steps.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lab_utils.errors import RunError
from lab_utils.recipe import Recipe

QUESTIONS = ("ascent-tasks-prompts", "test")  # manifest and split that both are asked


def bench_quality(recipe_name: str, *, run: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """Exact match of both on the held-out test split.

    Args:
        recipe_name: a named recipe or YAML file.
        run: an existing run of it (name, prefix, path or ``last``); absent: it is run first.
        limit: at most this many questions.

    Returns:
        ``ours`` and ``peer``: ``exact_match``, ``by_family``, ``tokens``, ``seconds``, ``steps``.

    Raises:
        RunError: one of the two trainings failed.
    """
    from lab_utils.runs.api import attach, launch

    recipe = Recipe.load(recipe_name)
    ours = attach(run) if run else launch(recipe)
    ours.wait(progress=sys.stderr.isatty())
    recipe = ours.recipe
    metrics = ours.metrics()
    folder = Path(ours.path) / "bench-quality"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier comparison
    folder.mkdir()
    report = _report(ours, limit, folder)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    log = folder / "trainer.log"
    with log.open("w") as sink:
        command = [sys.executable, "-m", "lab_utils.bench.quality", str(folder), str(limit or 0)]
        done = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RunError(
            f"The plain Trainer loop failed: {log.read_text().strip().splitlines()[-1]} (log: {log})"
        )
    mine = {
        **_exact_match(report),
        "tokens": int(metrics["train/num_tokens"].dropna().iloc[-1]),
        "seconds": float((metrics["perf/step_time"] * metrics.index.to_series().diff().fillna(1)).sum()),
        "steps": recipe.schedule.steps,
    }
    return {"ours": mine, "peer": json.loads((folder / "peer.json").read_text())}


def _report(run: Any, limit: int | None, folder: Path) -> dict[str, Any]:
    """The run's report on these questions: the one it has where that is of as many, else a new one in ``folder``."""
    from lab_utils.evaluation.held_out import load_questions
    from lab_utils.evaluation.report import evaluate, read_report

    try:
        report = read_report(Path(run.path))
    except RunError:  # none yet, or of an earlier structure
        report = {"exact_match": None, "manifests": []}
    asked = [(m["name"], m["split"]) for m in report["manifests"] if m["format"] == "prompt"]
    questions = len(load_questions(*QUESTIONS, limit))
    if asked == [QUESTIONS] and report["exact_match"]["n"] == questions:
        return report
    return evaluate(run, on=":".join(QUESTIONS), limit=limit, base=False, samples=0, out=folder)


def _exact_match(report: dict[str, Any]) -> dict[str, Any]:
    found = report["exact_match"]
    families = found["by_family"].items()
    return {"exact_match": found["value"], "by_family": {family: row["value"] for family, row in families}}


def _example(document: Any) -> dict[str, list[int]]:
    """A document as the Trainer takes it: labels are the ids where they bear loss, -100 elsewhere."""
    pairs = zip(document.input_ids, document.loss_weights)
    labels = [int(token) if weight > 0 else -100 for token, weight in pairs]
    return {"input_ids": [int(token) for token in document.input_ids], "labels": labels}


def _train_plainly(folder: Path, limit: int | None) -> dict[str, Any]:
    """The peer: ``transformers.Trainer`` over unpacked, right-padded examples."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from lab_utils.data.documents import encoding_of
    from lab_utils.data.loader import build_loader
    from lab_utils.evaluation.answering import ask
    from lab_utils.evaluation.held_out import load_held_out
    from lab_utils.evaluation.plan import BUDGETS
    from lab_utils.evaluation.scores import Findings, scores
    from lab_utils.models.load import load_model, save_pretrained

    recipe = Recipe.load(folder / "recipe.yaml")
    encoding = encoding_of(recipe)
    tokenizer = encoding.tokenizer
    loader = build_loader(recipe, tokenizer, rank=0, world_size=1)
    documents = [_example(document) for document in loader.documents]
    base = load_model(recipe.model.source, dtype=torch.float32, seed=recipe.seed)
    save_pretrained(base.state_dict(), base.config, folder / "base")
    per_step = max(1, round(len(documents) * recipe.rows_per_step / loader.rows_per_epoch))
    schedule, optim = recipe.schedule, recipe.optim
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=schedule.steps,
        per_device_train_batch_size=per_step,
        learning_rate=optim.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": schedule.final_lr_ratio},
        warmup_steps=schedule.warmup_steps,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip_norm,
        seed=recipe.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        # Without it most of a batch is padding, and a step takes ten times as long.
        train_sampling_strategy="group_by_length",
    )
    seen = 0

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        nonlocal seen
        seen += sum(len(example["input_ids"]) for example in batch)
        width = max(len(example["input_ids"]) for example in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, example in enumerate(batch):
            n = len(example["input_ids"])
            ids[row, :n] = torch.tensor(example["input_ids"])
            labels[row, :n] = torch.tensor(example["labels"])
            mask[row, :n] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, attn_implementation="eager"
    )
    started = time.time()
    Trainer(model=model, args=arguments, train_dataset=documents, data_collator=collate).train()
    seconds = time.time() - started
    save_pretrained(model.state_dict(), model.config, folder / "trained")
    held = load_held_out(*QUESTIONS, limit)
    trained = load_model(str(folder / "trained"), dtype=torch.float32)
    mode = recipe.data.mode
    answers = ask(trained, encoding, held.rows, mode=mode, budget=BUDGETS[mode])
    return {
        **_exact_match(scores([held], Findings({mode: answers}))),
        "tokens": seen,
        "seconds": seconds,
        "steps": schedule.steps,
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    outcome = _train_plainly(target, int(sys.argv[2]) or None)
    (target / "peer.json").write_text(json.dumps(outcome, indent=1))
