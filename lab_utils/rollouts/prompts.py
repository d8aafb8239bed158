"""Where prompts come from: rows of ``prompt`` manifests as one endless shuffled sequence, reasoning modes in turn.

Epoch ``e`` takes the next ``weight × rows`` of endless permutations of each source and shuffles them together, all from
``(seed, e)``, as the loader of documents does. All state is a position in that sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any

from lab_utils.data.documents import Encoding, encoding_of
from lab_utils.data.encoding import encode_messages
from lab_utils.data.loader import epoch_order
from lab_utils.data.manifest import of_source
from lab_utils.errors import DataError

if TYPE_CHECKING:
    from lab_utils.data.tokenizer import ChatTokenizer
    from lab_utils.recipe import DataSource, Recipe

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt of the sequence.

    Attributes:
        index: its place in the endless sequence.
        row: the manifest's row: ``messages``, and ``tools``, ``family``, ``verify`` where it has them.
        mode: chat, thinking or max.
        ids: token ids up to where generation starts.
    """

    index: int
    row: Row
    mode: str
    ids: list[int]


class Prompts:
    """The endless sequence of prompts; the same on every rank.

    Args:
        sources: rows of each source.
        encoding: how rows become tokens; its own mode is overruled.
        seed: of every shuffle.
        modes: reasoning modes; prompt ``i`` of the sequence has ``modes[i % len(modes)]``.
        weights: passes over each source in an epoch, 1.0 by default.
        keys: what tells the content of each source from others; absent: its rows.
        shuffle: False gives the rows in their order.

    Raises:
        DataError: an epoch would hold no prompt.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Row]],
        encoding: Encoding,
        *,
        seed: int,
        modes: Sequence[str] = ("chat",),
        weights: Sequence[float] | None = None,
        keys: Sequence[str] | None = None,
        shuffle: bool = True,
    ) -> None:
        self._sources, self.encoding, self.seed, self.modes = list(sources), encoding, seed, tuple(modes)
        self._weights = [Fraction(w) for w in (weights or [1.0] * len(self._sources))]
        self._shuffle = shuffle
        if not any(floor(w * len(s)) for w, s in zip(self._weights, self._sources)):
            raise DataError(
                "An epoch of the prompts is empty: give sources with rows, or raise their weight."
            )
        self._epoch = self._next = self._position = 0
        self._order: tuple[int, list[tuple[int, int]]] | None = None
        self._fingerprint = self._hash(keys)

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self.encoding.tokenizer

    @property
    def pad_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def position(self) -> int:
        """Prompts taken so far: the index of the next one."""
        return self._position

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._epoch + self._next / len(self._rows(self._epoch))

    def census(self) -> list[dict[str, int]]:
        """Prompts of each source, each once, without its weight."""
        return [{"units": len(rows)} for rows in self._sources]

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        taken: list[Prompt] = []
        while len(taken) < count:
            order = self._rows(self._epoch)
            for source, i in order[self._next : self._next + count - len(taken)]:
                row, mode = self._sources[source][i], self.modes[self._position % len(self.modes)]
                taken.append(Prompt(self._position, row, mode, prompt_ids(self.encoding, row, mode)))
                self._position, self._next = self._position + 1, self._next + 1
            if self._next >= len(order):
                self._epoch, self._next = self._epoch + 1, 0
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands; good for any number of ranks."""
        return {
            "epoch": self._epoch,
            "next": self._next,
            "position": self._position,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            DataError: the state belongs to other data, encoding, modes or seed.
        """
        if state.get("fingerprint") != self._fingerprint:
            raise DataError(
                f"The checkpoint's place in the prompts belongs to other data (expected {self._fingerprint[:12]}, "
                f"found {str(state.get('fingerprint'))[:12]}): resume with the same manifests, weights, tokenizer, "
                "rollout.modes and seed, or start a new run from its weights."
            )
        self._epoch, self._next, self._position = (int(state[k]) for k in ("epoch", "next", "position"))

    # -- inside ----------------------------------------------------------------------------------------------

    def _rows(self, epoch: int) -> list[tuple[int, int]]:
        """The prompts of an epoch as (source, row)."""
        if self._order is None or self._order[0] != epoch:
            sizes = [len(rows) for rows in self._sources]
            order = epoch_order(sizes, self._weights, self.seed, epoch, shuffle=self._shuffle)
            self._order = (epoch, order)
        return self._order[1]

    def _hash(self, keys: Sequence[str] | None) -> str:
        keys = keys or [hashlib.sha256(repr(list(rows)).encode()).hexdigest() for rows in self._sources]
        parts = [self.seed, self.modes, self._shuffle, self.encoding.fingerprint]
        parts += [(key, len(rows), str(w)) for key, rows, w in zip(keys, self._sources, self._weights)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def prompt_ids(encoding: Encoding, row: Row, mode: str) -> list[int]:
    """Token ids of a row up to where generation starts, in a reasoning mode.

    Args:
        encoding: its own mode is overruled.
        row: has ``messages`` and maybe ``tools``.
        mode: chat, thinking, or max: thinking after the text that asks for exhaustive reasoning.
    """
    segments = encode_messages(
        row["messages"],
        tools=row.get("tools"),
        mode="chat" if mode == "chat" else "thinking",
        effort="max" if mode == "max" else None,
        drop_thinking=encoding.drop_thinking,
        texts=encoding.texts,
    )
    return encoding.tokens(segments)[0]


def build_prompts(
    recipe: Recipe,
    tokenizer: ChatTokenizer,
    *,
    sources: Sequence[DataSource] | None = None,
    shuffle: bool = True,
) -> Prompts:
    """The prompts of a recipe: ``data.train``, or other sources, in ``rollout.modes``.

    Raises:
        DataError: data that is not what its manifest says, or of another format than prompt.
    """
    encoding = encoding_of(recipe, tokenizer)
    sources = recipe.data.train if sources is None else sources
    rows, keys = [], []
    for source in sources:
        manifest = of_source(source)
        if manifest.format != "prompt":
            raise DataError(
                f"{manifest.name} has format {manifest.format}, but sampling needs prompt: choose another manifest "
                "(lab data list)."
            )
        rows.append(list(manifest.rows(source.split)))
        keys.append(manifest.fingerprint(source.split))
    rollout = recipe.rollout
    return Prompts(
        rows,
        encoding,
        seed=recipe.seed,
        modes=(rollout and rollout.modes) or (recipe.data.mode,),
        weights=[source.weight for source in sources],
        keys=keys,
        shuffle=shuffle,
    )
