"""Pairs of answers: a chosen and a rejected one to the same prompt, always in the same row, the chosen one first.

A pair is two documents, each the whole conversation with loss on the answer alone. kto's pairs have a third one, the
same prompt with the chosen answer of the next pair in the split: what its KL is measured on. The order in a store and
in a row is chosen, rejected, mismatched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lab_utils.data.answers import answer_segments
from lab_utils.data.documents import Document, Documents, Encoded, Encoding, encoding_of, load_stored
from lab_utils.data.loader import Joined, PackedLoader, loader_options
from lab_utils.data.manifest import Manifest, of_source
from lab_utils.data.rows import PackedRows
from lab_utils.data.sources import cache_root
from lab_utils.errors import DataError

if TYPE_CHECKING:
    from lab_utils.data.tokenizer import ChatTokenizer
    from lab_utils.recipe import DataSource, Recipe

# Raised whenever this file gives other tokens or weights for the same row.
VERSION = 1
CHOSEN, REJECTED, MISMATCHED = 0, 1, 2  # roles of documents; -1 = padding


class Pairs:
    """A store whose documents belong together by twos or, with mismatched ones, by threes.

    Args:
        documents: the store; the role of ``documents[i]`` is ``i % size``.
        size: documents of a pair, 2 or 3.
    """

    def __init__(self, documents: Documents, size: int) -> None:
        self.documents, self.size = documents, size
        self.key, self.offsets, self.arrays = documents.key, documents.offsets, documents.arrays

    @property
    def lengths(self) -> np.ndarray:
        """int64 [pairs], tokens of all documents of each."""
        return np.diff(self.offsets[:: self.size])

    def __len__(self) -> int:
        return len(self.documents) // self.size

    def members(self, unit: int) -> range:
        """Indices of a pair's documents, which stand one behind the other in one row."""
        return range(unit * self.size, (unit + 1) * self.size)

    def fitted(self, row_tokens: int) -> Pairs:
        """The same, if every pair fits a row.

        Raises:
            DataError: one doesn't.
        """
        lengths = self.lengths
        long = np.flatnonzero(lengths > row_tokens)
        if len(long):
            first, most = int(long[0]), int(lengths.max())
            more = f" ({len(long)} such pairs, the longest of {most})" if len(long) > 1 else ""
            raise DataError(
                f"{self.documents.name} row {first + 1} has {lengths[first]} tokens in its {self.size} "
                f"documents{more}, which share a row, but data.row_tokens is {row_tokens}: set data.row_tokens to at "
                f"least {most}, or shorten or remove the row."
            )
        return self


class PairLoader(PackedLoader):
    """Packed rows of whole pairs; otherwise as ``PackedLoader``.

    Rows carry ``side["role"]`` int8 [B, T] and, once ``reference`` is set, ``side["reference_logps"]`` float32 [B, T].

    Args:
        pairs: the pairs of each source, none longer than a row.
        options: as for ``PackedLoader``.
    """

    def __init__(self, pairs: Sequence[Pairs], **options: Any) -> None:
        super().__init__(pairs, **options)
        self._starts = np.cumsum([0, *(len(source.documents.tokens) for source in pairs)])
        self._reference: np.ndarray | None = None

    @property
    def documents(self) -> Sequence[Document]:
        """The documents of all pairs, each once, without the sources' weights."""
        return Joined([source.documents for source in self._sources])

    # -- what a reference model thinks of the tokens ---------------------------------------------------------

    @property
    def store_tokens(self) -> int:
        """Tokens of all sources' stores, one behind the other: what ``reference`` is aligned with."""
        return int(self._starts[-1])

    @property
    def reference(self) -> np.ndarray | None:
        """float32 [store_tokens], the reference's log-probability of each token with loss; may be mapped from disk."""
        return self._reference

    @reference.setter
    def reference(self, logps: np.ndarray | None) -> None:
        if logps is not None and logps.shape != (self.store_tokens,):
            raise DataError(
                f"The reference's log-probabilities have shape {logps.shape}, but the pairs have {self.store_tokens} "
                "tokens: compute them again for this data."
            )
        self._reference = logps

    def reference_path(self, identity: str) -> Path:
        """Where the cache keeps ``reference`` for this data.

        Args:
            identity: of the reference's weights; fit for a file's name.
        """
        data = hashlib.sha256(repr([source.key for source in self._sources]).encode()).hexdigest()
        return cache_root() / "reference" / f"{data[:32]}-{identity}.npy"

    def reference_batches(
        self, rank: int, world: int, row_tokens: int, micro_rows: int
    ) -> Iterator[tuple[PackedRows, np.ndarray]]:
        """Every document of the stores once, in micro-batches for a pass of the reference.

        Args:
            rank: this rank's share of the rows, of ``world``; every rank gets equally many batches of equal heights.
            world: ranks that share the work.
            row_tokens: tokens of a row.
            micro_rows: rows of a micro-batch; the last may have fewer.

        Yields:
            Rows, and int64 [B, T]: the index of each token in ``reference``, -1 in the padding.
        """
        plain = PackedLoader(
            [source.documents for source in self._sources],
            rows_per_step=world,
            row_tokens=row_tokens,
            seed=0,
            rank=rank,
            world_size=world,
            pad_id=self.pad_id,
            shuffle=False,
        )
        for rows in plain.shares(micro_rows):
            places = np.full((len(rows), row_tokens), -1, np.int64)
            for b, at, _, source, document in plain.placed(rows):
                first, length = self._place(source, document)
                places[b, at : at + length] = np.arange(first, first + length)
            yield plain.packed(rows), places

    # -- inside ----------------------------------------------------------------------------------------------

    def packed(self, rows: list[list[tuple[int, int]]]) -> PackedRows:
        plain = super().packed(rows)
        role = np.full(plain.input_ids.shape, -1, np.int8)
        logps = np.zeros(plain.input_ids.shape, np.float32)
        for b, at, _, source, document in self.placed(rows):
            first, length = self._place(source, document)
            role[b, at : at + length] = document % self._sources[source].size
            if self._reference is not None:
                logps[b, at : at + length] = self._reference[first : first + length]
        side = {"role": torch.from_numpy(role)}
        if self._reference is not None:
            side["reference_logps"] = torch.from_numpy(logps)
        return replace(plain, side=side)

    def _place(self, source: int, document: int) -> tuple[int, int]:
        """Index of a document's first token in ``reference``, and its length."""
        start, stop = self._sources[source].offsets[document : document + 2]
        return int(self._starts[source] + start), int(stop - start)


def load_pairs(manifest: Manifest, split: str, encoding: Encoding, *, mismatched: bool = False) -> Pairs:
    """Every pair of a split, tokenised once for all ranks and runs.

    Args:
        manifest: of format preference.
        split: of it.
        encoding: how rows become tokens.
        mismatched: with a third document each, for kto.

    Raises:
        DataError: another format; data that is not what the manifest says; no second pair to take an answer from.
    """
    if manifest.format != "preference":
        raise DataError(
            f"{manifest.name} has format {manifest.format}, but learning from pairs needs preference: choose another "
            "manifest (lab data list)."
        )
    size = 3 if mismatched else 2
    stream = partial(_stream, mismatched=mismatched)
    return Pairs(load_stored(manifest, split, encoding, stream, f"pairs {size} {VERSION}"), size)


def answer_document(
    prompt: list[dict[str, Any]],
    answer: list[dict[str, Any]],
    tools: Any,
    encoding: Encoding,
    source: str = "",
) -> Document:
    """A conversation as one document, with loss on ``answer``. Raises: as ``answer_segments``."""
    ids, bears = encoding.tokens(answer_segments(prompt, answer, tools, encoding, source))
    return Document(ids, [float(each) for each in bears], source)


def _stream(manifest: Manifest, split: str, encoding: Encoding, *, mismatched: bool) -> Encoded:
    rows = manifest.located_rows(split)
    if (first := next(rows, None)) is None:
        return
    count = 0
    for (place, row), (_, following) in pairwise(chain([first], rows, [first])):
        answers = [row["chosen"], row["rejected"], *([following["chosen"]] if mismatched else [])]
        for answer in answers:
            document = answer_document(row["prompt"], answer, row.get("tools"), encoding, place)
            yield document.input_ids, bytes(weight > 0 for weight in document.loss_weights)
        count += 1
    if mismatched and count < 2:
        raise DataError(
            f"{manifest.name}:{split} has one pair, but objective.loss=kto compares with another pair's answer: give "
            "more rows, or choose another loss."
        )


def build_pair_loader(
    recipe: Recipe,
    tokenizer: ChatTokenizer,
    *,
    sources: Sequence[DataSource] | None = None,
    rank: int,
    world_size: int,
    train: bool = True,
    reference: np.ndarray | None = None,
) -> PairLoader:
    """The loader of the pairs that a recipe's preference or reward objective learns from.

    Args:
        recipe: says row length, batch, seed, encoding; whether the loss is kto.
        tokenizer: of the model.
        sources: absent: ``data.train``, or ``data.validation`` where ``train`` is False.
        rank: this rank.
        world_size: data-parallel ranks.
        train: False gives pairs in their order, for one pass with ``batches``.
        reference: see ``PairLoader.reference``, which can be set later.

    Raises:
        DataError: data that is not what its manifest says, of another format than preference, or with a pair longer
            than a row.
        LayoutError: the batch cannot be shared evenly by the ranks.
    """
    data = recipe.data
    encoding, mismatched = encoding_of(recipe, tokenizer), recipe.objective.loss == "kto"
    given = sources if sources is not None else data.train if train else data.validation
    pairs = [
        load_pairs(of_source(source), source.split, encoding, mismatched=mismatched).fitted(data.row_tokens)
        for source in given
    ]
    options = loader_options(recipe, tokenizer, given, rank=rank, world_size=world_size, train=train)
    loader = PairLoader(pairs, **options)
    loader.reference = reference
    return loader
