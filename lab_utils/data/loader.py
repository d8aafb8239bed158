"""The stateful loader: which documents stand in which row is fixed by data and seed, not by ranks or
restarts.

Epoch ``e`` shuffles the documents, packs them first-fit and shuffles the rows, all from ``(seed, e)``. The
rows of all epochs form one endless sequence; step ``s`` takes its next ``rows_per_step`` rows and rank ``r``
of ``w`` every ``w``-th of them from ``r`` on. Rows left over at the end of an epoch open the step that goes
on with the next: no step is short, no document dropped. All state is a position in that sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lab_utils.data.documents import TRAINABLE, Document, Documents, encoding_of, load_documents
from lab_utils.data.manifest import of_source
from lab_utils.data.packing import first_fit
from lab_utils.data.rows import PackedRows
from lab_utils.errors import DataError, LayoutError

if TYPE_CHECKING:
    from lab_utils.data.tokenizer import ChatTokenizer
    from lab_utils.recipe import DataSource, Recipe


class PackedLoader:
    """Packed rows of one rank.

    What is shuffled, packed and never split is a *unit* of a source: here a document, in ``PairLoader`` a pair.

    Args:
        documents: the documents of each source, no unit longer than a row.
        rows_per_step: rows of a global step, a multiple of ``world_size``.
        row_tokens: T.
        seed: of every shuffle.
        rank: this rank, 0 … world_size - 1.
        world_size: data-parallel ranks.
        weights: passes over each source in an epoch, 1.0 by default; 0.5 takes one half in one epoch and
            the other in the next.
        pad_id: token id in the padding.
        shuffle: False keeps the documents in their order (evaluation).
        tag_sources: rows carry ``side["source"]`` int16 [B, T], which of the sources a token comes from.

    Raises:
        LayoutError: ``rows_per_step`` is not a multiple of ``world_size``.
        DataError: no documents.
    """

    def __init__(
        self,
        documents: Sequence[Documents],
        *,
        rows_per_step: int,
        row_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | None = None,
        pad_id: int = 0,
        shuffle: bool = True,
        tag_sources: bool = False,
    ) -> None:
        if rows_per_step % world_size:
            raise LayoutError(
                f"{rows_per_step} rows a step cannot be shared evenly by {world_size} ranks: "
                f"set schedule.batch_tokens to a multiple of {world_size * row_tokens}."
            )
        self.rows_per_step, self.row_tokens, self.seed = rows_per_step, row_tokens, seed
        self.rank, self.world_size, self.pad_id, self._shuffle = rank, world_size, pad_id, shuffle
        self._sources = list(documents)
        self._weights = [Fraction(w) for w in (weights or [1.0] * len(self._sources))]
        self._lengths = [source.lengths for source in self._sources]
        if not any(floor(w * len(s)) for w, s in zip(self._weights, self._sources)):
            raise DataError(
                "An epoch of data.train holds no document: give sources with rows, or raise their weight."
            )
        self.tag_sources = tag_sources
        self._epochs: dict[int, list[list[tuple[int, int]]]] = {}
        self._epoch, self._next_row = 0, 0
        self._fingerprint = self._hash()

    # -- training --------------------------------------------------------------------------------------------

    def next_step(self) -> PackedRows:
        """This rank's rows of the next step, [rows_per_step / world_size, T]."""
        taken = []
        while len(taken) < self.rows_per_step:
            rows = self._rows(self._epoch)
            part = rows[self._next_row : self._next_row + self.rows_per_step - len(taken)]
            taken += part
            self._next_row += len(part)
            if self._next_row == len(rows):
                self._epoch, self._next_row = self._epoch + 1, 0
        return self.packed(taken[self.rank :: self.world_size])

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence of rows stands; the same on every rank, good for any number of ranks."""
        return {"epoch": self._epoch, "next_row": self._next_row, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            DataError: the state belongs to other data, row length or seed.
        """
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                f"The checkpoint's place in the data belongs to other data (expected "
                f"{self._fingerprint[:12]}, found "
                f"{str(state['fingerprint'])[:12]}): resume with the same manifests, weights, tokenizer, "
                "data.row_tokens and seed, or start a new run from its weights."
            )
        self._epoch, self._next_row = int(state["epoch"]), int(state["next_row"])

    # -- evaluation ------------------------------------------------------------------------------------------

    def batches(self, micro_rows: int) -> list[PackedRows]:
        """One pass over epoch 0, in order; rows of padding alone give every rank equally many."""
        return [self.packed(rows) for rows in self.shares(micro_rows)]

    def shares(self, micro_rows: int) -> list[list[list[tuple[int, int]]]]:
        """What ``batches`` packs: for each micro-batch its rows, for each row its units as (source, index)."""
        rows = self._rows(0)
        rows = rows + [[]] * (-len(rows) % self.world_size)
        mine = rows[self.rank :: self.world_size]
        return [mine[i : i + micro_rows] for i in range(0, len(mine), micro_rows)]

    # -- what is in it ---------------------------------------------------------------------------------------

    @property
    def documents(self) -> Sequence[Document]:
        """The documents of all sources, each once, without their weights."""
        return Joined(self._sources)

    def census(self) -> list[dict[str, int]]:
        """Units (documents, or pairs) and tokens of each source, each once, without its weight."""
        return [
            {"units": len(source), "tokens": int(lengths.sum())}
            for source, lengths in zip(self._sources, self._lengths)
        ]

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the epoch that the loader stands in."""
        return len(self._rows(self._epoch))

    @property
    def padding_fraction(self) -> float:
        """Padding in the rows of that epoch."""
        rows = self._rows(self._epoch)
        used = sum(int(self._lengths[source][unit]) for row in rows for source, unit in row)
        return 1.0 - used / (len(rows) * self.row_tokens)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._epoch + self._next_row / self.rows_per_epoch

    # -- rows as tensors -------------------------------------------------------------------------------------

    def placed(self, rows: list[list[tuple[int, int]]]) -> Iterator[tuple[int, int, int, int, int]]:
        """Every document of some rows: row, first token, number in the row, source, index in the source."""
        for b, row in enumerate(rows):
            at = number = 0
            for source, unit in row:
                for document in self._sources[source].members(unit):
                    yield b, at, number, source, document
                    offsets = self._sources[source].offsets
                    at, number = at + int(offsets[document + 1] - offsets[document]), number + 1

    def packed(self, rows: list[list[tuple[int, int]]]) -> PackedRows:
        """Rows of units, (source, index) each, as tensors."""
        B, T = len(rows), self.row_tokens
        input_ids = np.full((B, T), self.pad_id, np.int64)
        position_ids = np.zeros((B, T), np.int64)
        document_ids = np.full((B, T), -1, np.int64)
        loss_weights = np.zeros((B, T), np.float32)
        ends = [0] * B
        for b, at, number, source, document in self.placed(rows):
            ids, weights = self._sources[source].arrays(document)
            stop = ends[b] = at + len(ids)
            input_ids[b, at:stop], loss_weights[b, at:stop] = ids, weights
            position_ids[b, at:stop], document_ids[b, at:stop] = np.arange(len(ids)), number
        for b, end in enumerate(ends):
            position_ids[b, end:] = np.arange(T - end)
        side = {}
        if self.tag_sources:
            side["source"] = torch.zeros(B, T, dtype=torch.int16)
            for b, at, _, source, _ in self.placed(rows):
                side["source"][b, at:] = source
        tensors = map(torch.from_numpy, (input_ids, position_ids, document_ids, loss_weights))
        return PackedRows(*tensors, side=side)

    # -- inside ----------------------------------------------------------------------------------------------

    def _rows(self, epoch: int) -> list[list[tuple[int, int]]]:
        """All rows of an epoch: for each its units as (source, index)."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # this epoch and the one before are all that a loop looks at
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._pack(epoch)
        return self._epochs[epoch]

    def _pack(self, epoch: int) -> list[list[tuple[int, int]]]:
        sizes = [len(source) for source in self._sources]
        chosen = epoch_order(sizes, self._weights, self.seed, epoch, shuffle=self._shuffle)
        lengths = [int(self._lengths[s][i]) for s, i in chosen]
        rows = [[chosen[i] for i in row] for row in first_fit(lengths, self.row_tokens)]
        # Late documents of first-fit fill gaps in early rows: shuffled, so that length doesn't go with time.
        return [rows[i] for i in _permutation(len(rows), self.seed, 2, epoch)] if self._shuffle else rows

    def _hash(self) -> str:
        parts = [self.seed, self.row_tokens]
        parts += [(s.key, len(s), str(w)) for s, w in zip(self._sources, self._weights)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


class Joined(Sequence):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts, self._starts = parts, np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = index % len(self)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]


def epoch_order(
    sizes: Sequence[int], weights: Sequence[Fraction], seed: int, epoch: int, *, shuffle: bool = True
) -> list[tuple[int, int]]:
    """What an epoch holds, in its order: of each source the next ``weight × n`` items, as (source, item).

    Args:
        sizes: items of each source.
        weights: passes over each source in an epoch.
        shuffle: False keeps each source's order, one source after the other.
    """
    chosen = [
        (source, int(i))
        for source, (n, weight) in enumerate(zip(sizes, weights, strict=True))
        for i in _drawn(n, weight, seed, epoch, source, shuffle)
    ]
    return [chosen[i] for i in _permutation(len(chosen), seed, 1, epoch)] if shuffle else chosen


def _drawn(n: int, weight: Fraction, seed: int, epoch: int, source: int, shuffle: bool) -> Iterator[int]:
    """The next ``weight × n`` of endless permutations of a source."""
    at, stop = floor(epoch * weight * n), floor((epoch + 1) * weight * n)
    while at < stop:
        cycle, start = divmod(at, n)
        end = min(n, start + stop - at)
        # Half a source, even in its order, is another half in the next epoch.
        whole = end - start == n
        order = _permutation(n, seed, 3, cycle, source) if shuffle or not whole else np.arange(n)
        part = order[start:end]
        yield from part if shuffle else np.sort(part)
        at += end - start


def _permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of 0 … n - 1 that depends on ``key`` alone.

    Made from raw Philox words: that stream is the same in every version of numpy, ``Generator.permutation``
    may change.
    """
    words = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(words, "little"))
    return np.argsort(generator.random_raw(n), kind="stable") if n else np.zeros(0, np.int64)


def build_loader(
    recipe: Recipe,
    tokenizer: ChatTokenizer,
    *,
    sources: Sequence[DataSource] | None = None,
    rank: int,
    world_size: int,
    train: bool = True,
) -> PackedLoader:
    """The loader of a recipe's training or validation data.

    Args:
        recipe: says row length, batch, seed, encoding.
        tokenizer: of the model.
        sources: absent: ``data.train``, or ``data.validation`` where ``train`` is False.
        rank: this rank.
        world_size: data-parallel ranks.
        train: False gives documents in their order, for one pass with ``batches``.

    Raises:
        DataError: data that is not what its manifest says, of a format without anything to learn from, or
        with a
            conversation longer than a row.
        LayoutError: the batch cannot be shared evenly by the ranks.
    """
    data = recipe.data
    encoding = encoding_of(recipe, tokenizer)
    given = sources if sources is not None else data.train if train else data.validation
    documents = []
    for source in given:
        manifest = of_source(source)
        if manifest.format not in TRAINABLE:
            raise DataError(
                f"{manifest.name} has format {manifest.format}, but training on documents needs "
                f"{' or '.join(TRAINABLE)}: choose another manifest (lab data list)."
            )
        loaded = load_documents(manifest, source.split, encoding)
        documents.append(loaded.fitted(data.row_tokens, cut=manifest.format == "text"))
    options = loader_options(recipe, tokenizer, given, rank=rank, world_size=world_size, train=train)
    return PackedLoader(documents, **options, tag_sources=recipe.objective.kind == "distill")


def loader_options(
    recipe: Recipe,
    tokenizer: ChatTokenizer,
    sources: Sequence[DataSource],
    *,
    rank: int,
    world_size: int,
    train: bool,
) -> dict[str, Any]:
    """What a recipe says of a loader, whatever its units are: arguments of ``PackedLoader``."""
    return {
        "rows_per_step": recipe.rows_per_step if train else world_size,
        "row_tokens": recipe.data.row_tokens,
        "seed": recipe.seed,
        "rank": rank,
        "world_size": world_size,
        "weights": [source.weight for source in sources],
        "pad_id": tokenizer.eos_id,
        "shuffle": train,
    }
