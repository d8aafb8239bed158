"""Makes the manifests and the small files of the sets that the project ships.

    python -m lab_utils.data.tasks._ship [--out data_manifests]

Training splits are not stored: their manifest pins what the generator gives. Run it after a change to a
family, raise ``VERSION``, and train the tokenizer and the base model again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lab_utils.data import generated

VERSION = "1"
LICENCE = "Apache-2.0"
HELD_OUT = (
    "Splits share no question: a key made from each question is hashed to train (91%), validation (4%) "
    "or test (5%). Where facts are many (comparisons, lists, pairs of words, JSON objects) the key is the "
    "fact whatever its wording, so held-out facts occur neither in training questions nor in the running "
    "text. Where facts are few (sums, differences and products of small numbers, stories about them, "
    "neighbours of a number, unit tables, spelling, categories, opposites, tool calls, safety) the key is "
    "the question's normalised wording: the fact is told in the text and asked in training in other words."
)
PROVENANCE = "Made by this project's own generator (lab_utils/data/tasks), from a seed; no outside text."
CARDS: dict[str, dict[str, Any]] = {
    "ascent-tasks-sft": {
        "format": "messages",
        "description": "Verifiable tasks in eight families as chats; the last message is the gold answer.",
        "generator": "tasks_messages",
        "splits": {"train": (20000, 101), "validation": (400, 102), "test": (480, 103)},
    },
    "ascent-tasks-preference": {
        "format": "preference",
        "description": "The same tasks with the gold answer and one that fails the verifier.",
        "generator": "tasks_preference",
        "splits": {"train": (8000, 201), "validation": (240, 202), "test": (240, 203)},
    },
    "ascent-tasks-prompts": {
        "format": "prompt",
        "description": "The same tasks without answers; the verify column is what a reward checks.",
        "generator": "tasks_prompts",
        "splits": {"train": (8000, 301), "validation": (240, 302), "test": (480, 103)},
    },
    "ascent-tasks-text": {
        "format": "text",
        "description": "Running text about the tasks' world, without chat, to pre-train a small base.",
        "generator": "tasks_text",
        "splits": {"train": (100000, 401), "validation": (300, 402)},
    },
}


def manifest(name: str, folder: Path) -> dict[str, Any]:
    """The manifest of one set; small splits are written below ``folder``, large ones only measured."""
    card = CARDS[name]
    splits: dict[str, Any] = {}
    for split, (rows, seed) in card["splits"].items():
        arguments: dict[str, Any] = {"split": split, "rows": rows}
        if split != "train" and card["format"] != "text":
            arguments["balanced"] = True
        path = f"{name}/{split}.jsonl"
        if split == "train":
            with tempfile.TemporaryDirectory() as scratch:
                pins = generated.write_jsonl(
                    Path(scratch) / "train.jsonl", card["generator"], arguments, seed
                )
            source = {"generator": card["generator"], "arguments": arguments, "seed": seed}
            splits[split] = {"kind": "generated", **source, **pins}
        else:
            pins = generated.write_jsonl(folder / path, card["generator"], arguments, seed)
            splits[split] = {"kind": "file", "files": [{"path": path, **pins}]}
    return {
        "name": name,
        "version": VERSION,
        "licence": LICENCE,
        "provenance": f"{card['description']} {PROVENANCE} {HELD_OUT}",
        "format": card["format"],
        "splits": splits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab_utils.data.tasks._ship", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("data_manifests"))
    folder = parser.parse_args().out
    for name in CARDS:
        tree = manifest(name, folder)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=108)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        print(name, {split: rows for split, (rows, _) in CARDS[name]["splits"].items()})


if __name__ == "__main__":
    main()
