"""Training of the shipped tokenizer: byte-level BPE, digits one by one, the words of the tasks' world whole.

    python -m lab_utils.data.tokenizer train [--out FOLDER] [--vocab-size 2048]

The same corpus gives the same file; ``training.json`` beside it holds version, size and sha256 of the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lab_utils.data import generated
from lab_utils.data.encoding import render
from lab_utils.data.tasks._words import SHORT, closed_vocabulary
from lab_utils.data.tokenizer import SHIPPED, SPECIAL_TOKENS, ChatTokenizer

VERSION = "1"
VOCABULARY = 2048
# Seeds of its own: the corpus is of the same kind as the shipped sets, training splits only.
CHATS = ("tasks_messages", {"split": "train", "rows": 12000}, 901)
PROSE = ("tasks_text", {"split": "train", "rows": 8000}, 902)
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_SPELLED_BACKWARDS = {word[::-1] for word in SHORT} - set(closed_vocabulary())


def corpus() -> Iterator[str]:
    """Texts to learn merges from: prose, encoded chats between special tokens, and every word in both forms.

    Words in capitals and words spelled backwards are left out: they should stay in pieces, near to letters.
    """
    for row in generated.rows(*PROSE):
        yield _without_oddities(row["text"])
    for row in generated.rows(*CHATS):
        encoded = render(row["messages"], tools=row.get("tools"))
        yield from map(_without_oddities, _SPECIAL.split(encoded))
    words = closed_vocabulary()
    for _ in range(400):
        yield from words
        yield " " + " ".join(words)


def train(texts: Iterable[str], vocab_size: int = VOCABULARY) -> ChatTokenizer:
    """A tokenizer with V4's special tokens (BOS 0, EOS 1, pad 2, …) and ``vocab_size`` entries in all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return ChatTokenizer(json.loads(tokenizer.to_str()), "the new tokenizer")


def _without_oddities(text: str) -> str:
    return re.sub(
        r" ?\w+",
        lambda m: "" if m[0].strip() in _SPELLED_BACKWARDS or re.fullmatch(r" ?[A-Z]{2,}", m[0]) else m[0],
        text,
    )


def train_shipped(folder: Path = SHIPPED, vocab_size: int = VOCABULARY) -> ChatTokenizer:
    """Train on ``corpus()`` and write the tokenizer with its ``training.json``."""
    digest, size = hashlib.sha256(), 0

    def counted() -> Iterator[str]:
        nonlocal size
        for text in corpus():
            data = text.encode()
            digest.update(data + b"\0")
            size += len(data)
            yield text

    tokenizer = train(counted(), vocab_size)
    tokenizer.save(folder)
    record = {
        "version": VERSION,
        "vocab_size": tokenizer.vocab_size,
        "corpus_bytes": size,
        "corpus_sha256": digest.hexdigest(),
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "command": "python -m lab_utils.data.tokenizer train",
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab_utils.data.tokenizer", description=__doc__.split("\n")[0]
    )
    train_parser = parser.add_subparsers(dest="verb", required=True).add_parser("train")
    train_parser.add_argument("--out", type=Path, default=SHIPPED)
    train_parser.add_argument("--vocab-size", type=int, default=VOCABULARY)
    options = parser.parse_args(arguments)
    tokenizer = train_shipped(options.out, options.vocab_size)
    print(f"{options.out}: {tokenizer.vocab_size} tokens")
