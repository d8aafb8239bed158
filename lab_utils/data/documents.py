"""Rows to documents: token ids with the loss weight of each, and a store of them that ranks share on disk.

A document is what packing never splits: a conversation, or a piece of running text no longer than a row. The
store is three flat arrays in the cache, mapped into memory, so 16 ranks of a node tokenise a set once and
hold it once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lab_utils.data.encoding import encode_messages
from lab_utils.data.fixed_texts import FixedTexts
from lab_utils.data.sources import cache_root, check_file, locked, writing
from lab_utils.data.tokenizer import load_tokenizer
from lab_utils.errors import DataError

if TYPE_CHECKING:
    from lab_utils.data.manifest import Manifest
    from lab_utils.data.tokenizer import ChatTokenizer
    from lab_utils.recipe import Recipe

# Raised whenever this file or encoding.py gives other tokens or weights for the same row.
VERSION = 1
TRAINABLE = ("messages", "text")


@dataclass(frozen=True)
class Document:
    """Tokens of one document.

    Attributes:
        input_ids: token ids.
        loss_weights: weight of predicting each token from those before it; 0 on the first.
        source: where it comes from, for messages.
    """

    input_ids: list[int]
    loss_weights: list[float]
    source: str


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens: everything besides the row that the result depends on."""

    tokenizer: ChatTokenizer
    mode: str = "chat"
    drop_thinking: bool = True
    texts: FixedTexts | None = None

    @cached_property
    def fingerprint(self) -> str:
        texts = (self.texts or FixedTexts.shipped()).hash
        parts = (VERSION, self.tokenizer.backend.to_str(), self.mode, self.drop_thinking, texts)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def segments(
        self, messages: Sequence[dict[str, Any]], tools: Any = None, prompt: bool = True
    ) -> list[Any]:
        """Segments of a conversation; ``prompt``: a trailing question is followed by the answer's prefix."""
        return encode_messages(
            messages,
            tools=tools,
            mode=self.mode,
            drop_thinking=self.drop_thinking,
            add_generation_prompt=prompt,
            texts=self.texts,
        )

    def tokens(self, segments: Sequence[Any]) -> tuple[list[int], list[bool]]:
        """Token ids of segments, and which of them bear loss."""
        ids, owner = self.tokenizer.encode_segments([(s.text, s.markup) for s in segments])
        return ids, [segments[i].supervised for i in owner]

    def prompt_ids(self, row: dict[str, Any]) -> list[int]:
        """Token ids of a prompt row, up to where generation starts."""
        return self.tokens(self.segments(row["messages"], row.get("tools")))[0]


def encode_row(row: dict[str, Any], format: str, encoding: Encoding, source: str = "") -> Document:
    """A checked row as one document.

    ``messages``: loss on what the assistant says. ``prompt``: no loss. ``text``: between begin and end token,
    loss on all but the first.

    Raises:
        DataError: a format that isn't one document a row (preference).
    """
    tokenizer = encoding.tokenizer
    if format == "text":
        ids = [tokenizer.bos_id, *tokenizer.encode(row["text"]), tokenizer.eos_id]
        return Document(ids, [0.0, *[1.0] * (len(ids) - 1)], source)
    if format not in ("messages", "prompt"):
        raise DataError(
            f"{source or 'A row'}: format {format} isn't one document a row; expected messages or text."
        )
    ids, supervised = encoding.tokens(
        encoding.segments(row["messages"], row.get("tools"), prompt=format == "prompt")
    )
    weights = [float(bears) for bears in supervised]
    weights[0] = 0.0
    return Document(ids, weights, source)


class Documents(Sequence):
    """Documents of one split, in the order of its rows; ``documents[i]`` is a ``Document``.

    Attributes:
        tokens: int32, all documents one behind the other.
        supervised: bool, which of them bear loss.
        offsets: int64 [documents + 1], where each begins.
        name: ``manifest:split``.
    """

    def __init__(
        self, tokens: np.ndarray, supervised: np.ndarray, offsets: np.ndarray, name: str, key: str
    ) -> None:
        self.tokens, self.supervised, self.offsets, self.name, self.key = (
            tokens,
            supervised,
            offsets,
            name,
            key,
        )

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents], tokens of each."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = index % len(self)
        ids, weights = self.arrays(index)
        return Document(ids.tolist(), weights.tolist(), f"{self.name} document {index + 1}")

    def members(self, unit: int) -> tuple[int, ...]:
        """Indices of the documents that packing keeps together: each stands alone."""
        return (unit,)

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32) and loss weights (float32) of one document; the first token's weight is 0."""
        start, stop = self.offsets[index], self.offsets[index + 1]
        weights = self.supervised[start:stop].astype(np.float32)
        weights[0] = 0.0  # the first piece of a cut text included
        return self.tokens[start:stop], weights

    def fitted(self, row_tokens: int, cut: bool) -> Documents:
        """The same with no document longer than a row.

        Args:
            row_tokens: tokens of a row.
            cut: running text is cut into pieces of a row's length; a conversation is not.

        Raises:
            DataError: a conversation is longer than a row.
        """
        lengths = self.lengths
        long = np.flatnonzero(lengths > row_tokens)
        if not len(long):
            return self
        if not cut:
            first, most = int(long[0]), int(lengths.max())
            more = f" ({len(long)} such rows, the longest of {most})" if len(long) > 1 else ""
            raise DataError(
                f"{self.name} row {first + 1} has {lengths[first]} tokens{more}, but data.row_tokens is "
                f"{row_tokens}: "
                f"set data.row_tokens to at least {most}, or shorten or remove the row."
            )
        ends = [self.offsets[:1]]
        for start, stop in zip(self.offsets[:-1], self.offsets[1:]):
            ends.append(np.append(np.arange(start + row_tokens, stop, row_tokens), stop))
        return Documents(self.tokens, self.supervised, np.concatenate(ends), self.name, self.key)


def load_documents(manifest: Manifest, split: str, encoding: Encoding) -> Documents:
    """Every document of a split, tokenised once for all ranks and runs (cache key: data, tokenizer,
    encoding).

    Raises:
        DataError: the data is not what the manifest says.
    """
    return load_stored(manifest, split, encoding, _stream)


# Token ids of each document, and a byte a token: 1 where it bears loss.
Encoded = Iterator[tuple[list[int], bytes]]


def load_stored(
    manifest: Manifest,
    split: str,
    encoding: Encoding,
    stream: Callable[[Manifest, str, Encoding], Encoded],
    kind: str = "",
) -> Documents:
    """The documents that ``stream`` makes of a split, from the cache or into it.

    Args:
        manifest: the data.
        split: of it.
        encoding: how rows become tokens.
        stream: called where the store isn't there yet.
        kind: tells the stores of several streams apart; changes whenever its stream gives other tokens.

    Raises:
        DataError: the data is not what the manifest says.
    """
    parts = (manifest.fingerprint(split), encoding.fingerprint, *([kind] if kind else []))
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    folder = cache_root() / "tokens" / key[:32]
    for path, sha256, size in manifest.files(split):  # tokens of data that has gone bad are not used
        check_file(path, sha256, size, manifest.name)
    done = folder / "meta.json"
    if not done.exists():
        with locked(folder):
            if not done.exists():  # another rank may have been quicker
                _write(folder, _encoded(stream(manifest, split, encoding)))
    tokens, supervised, offsets = (
        np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("tokens", "supervised", "offsets")
    )
    return Documents(tokens, supervised, np.asarray(offsets), f"{manifest.name}:{split}", key)


def _encoded(documents: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, supervised, offsets = array("i"), bytearray(), array("q", [0])
    for ids, bears in documents:
        tokens.extend(ids)
        supervised += bears
        offsets.append(len(tokens))
    return (
        np.frombuffer(tokens, np.int32) if tokens else np.zeros(0, np.int32),
        np.frombuffer(supervised, np.bool_) if supervised else np.zeros(0, np.bool_),
        np.frombuffer(offsets, np.int64),
    )


def _stream(manifest: Manifest, split: str, encoding: Encoding) -> Encoded:
    if manifest.format != "text":
        for place, row in manifest.located_rows(split):
            document = encode_row(row, manifest.format, encoding, place)
            yield document.input_ids, bytes(weight > 0 for weight in document.loss_weights)
        return
    tokenizer = encoding.tokenizer
    for batch in _batches((row["text"] for row in manifest.rows(split)), 1024):
        for ids in tokenizer.encode_batch(batch):
            yield [tokenizer.bos_id, *ids, tokenizer.eos_id], bytes(1) + b"\1" * (len(ids) + 1)


def _batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write(folder: Path, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """The folder of a store: whole, then renamed into place."""
    with writing(folder):
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name, suffix=".making"))
        try:
            for name, values in zip(("tokens", "supervised", "offsets"), arrays):
                np.save(temporary / f"{name}.npy", values)
            meta = {"documents": len(arrays[2]) - 1, "tokens": len(arrays[0]), "version": VERSION}
            (temporary / "meta.json").write_text(json.dumps(meta))
            os.chmod(temporary, 0o755)
            os.rename(temporary, folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not (folder / "meta.json").exists():  # else another process was quicker
                raise


def encoding_of(recipe: Recipe, tokenizer: ChatTokenizer | None = None) -> Encoding:
    """The encoding that a recipe asks for: its mode, its texts, and its tokenizer where none is given.

    Raises:
        DataError: a tokenizer or an encoding folder that cannot be read.
    """
    from lab_utils.models.load import load_tokenizer_path

    tokenizer = tokenizer or load_tokenizer(
        recipe.model.tokenizer or load_tokenizer_path(recipe.model.source)
    )
    texts = FixedTexts.from_encoding_folder(recipe.model.encoding) if recipe.model.encoding else None
    return Encoding(tokenizer, recipe.data.mode, recipe.data.drop_thinking, texts)
