"""The write-ahead log of sampled tokens: what a killed round had sampled is read back, never sampled again.

A file holds frames: length and CRC-32 of a body, then the body. A write that a kill tore leaves a last frame that
fails its check; opening the file cuts it off. Every ``append`` reaches the operating system, so that it outlives the
process; to outlive the machine, the file is also synced, at most every ``SYNC_SECONDS`` and when it is closed.

``TokenLog`` is one file. ``RoundLogs`` is a folder of them, one a round and rank: a round that other ranks began is
read from all their files, and each token knows its place in its answer.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lab_utils.errors import CheckpointError, DataError, RunError

SYNC_SECONDS = 0.5
_MAGIC = b"ascent-token-log-1\n"
_FRAME = struct.Struct("<II")
_TOKENS, _PROMPT, _FINAL, _CONTEXT = range(4)
_TOKEN = np.dtype([("key", "<i8"), ("place", "<u4"), ("token", "<u4"), ("logprob", "<f8")])
_PROMPTS = np.dtype([("key", "<i8"), ("hash", "S16")])
_FINALS = np.dtype([("key", "<i8"), ("finished", "?"), ("reward", "<f8")])
_ROUND = re.compile(r"round-(\d{6,})\.rank-(\d+)\.log")


@dataclass
class Logged:
    """What a log knows of one answer.

    Attributes:
        tokens, logprobs: in order; a log-probability is NaN where the sampler gave none.
        prompt: hash of the prompt, hexadecimal; empty where none was announced.
        final: whether the answer is complete.
        finished: it ended by itself; meaningful once ``final``.
        reward: NaN where none was written.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt: str = ""
    final: bool = False
    finished: bool = False
    reward: float = float("nan")


def prompt_hash(prompt: Sequence[int]) -> str:
    """16 hexadecimal digits of a prompt's token ids."""
    return hashlib.blake2b(np.asarray(prompt, "<i8").tobytes(), digest_size=8).hexdigest()


class TokenLog:
    """One file. Use ``TokenLog.open``; one process at a time may hold it.

    Attributes:
        path: of the file.
        answers: by key, what is known: read from this file, from ``others``, and appended since.
        cut: bytes of a torn tail that opening took off.
    """

    def __init__(self, path: Path, descriptor: int, answers: dict[int, Logged], cut: int) -> None:
        self.path, self.answers, self.cut = path, answers, cut
        self._file: int | None = descriptor
        self._synced = time.monotonic()

    @classmethod
    def open(cls, path: str | Path, *, context: str = "", others: Iterable[Path] = ()) -> TokenLog:
        """Open a log, new or left by a killed process.

        Args:
            path: the file; its folder exists.
            context: whatever the tokens depend on besides prompt and key (sampling settings, say).
            others: files of other ranks that hold tokens of the same round; they are only read.

        Raises:
            RunError: another process has it open.
            DataError: the log was written under another context.
            CheckpointError: not such a log, or it holds a token twice, or not the tokens before one.
        """
        path, others = Path(path), list(others)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"{path}: another process writes this log: stop the other attempt at the run first."
                ) from None
            data = path.read_bytes()
            if not _MAGIC.startswith(data[: len(_MAGIC)]):
                raise CheckpointError(
                    f"{path}: not a log of sampled tokens: remove it to sample the round anew."
                )
            bodies, end = _frames(data)
            found = [(path, bodies)] + [(other, _frames(other.read_bytes())[0]) for other in others]
            answers = _read(found, context)
            cut = len(data) - end
            if cut:
                os.ftruncate(descriptor, end)
            os.lseek(descriptor, 0, os.SEEK_END)
            log = cls(path, descriptor, answers, cut)
            if not end:
                log._write(_MAGIC + _framed(_CONTEXT, _digest(context)))
            log.sync()
            return log
        except BaseException:
            os.close(descriptor)
            raise

    # -- writing ---------------------------------------------------------------------------------------------

    def announce(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Bind keys to their prompts; before their first token.

        Raises:
            DataError: the log has tokens of another prompt under that key.
        """
        new = []
        for key, prompt in prompts.items():
            known, digest = self.answers.setdefault(key, Logged()), prompt_hash(prompt)
            if known.prompt and known.prompt != digest:
                raise DataError(
                    f"{self.path}: the tokens logged for answer {key} belong to another prompt: resume with the data, "
                    "seed and tokenizer of the run, or remove the log to sample the round anew."
                )
            if not known.prompt:
                known.prompt = digest
                new.append((key, digest))
        if new:
            self._write(_framed(_PROMPT, np.array(new, _PROMPTS).tobytes()))

    def append(self, tokens: Sequence[tuple[int, int, float]]) -> None:
        """The next tokens of some answers, (key, token, log-probability) each; with the operating system on return.

        Raises:
            RunError: a token for an answer that is complete.
        """
        rows = []
        for key, token, logprob in tokens:
            known = self.answers.setdefault(key, Logged())
            if known.final:
                raise RunError(
                    f"{self.path}: answer {key} is complete in the log, yet a token was sampled for it."
                )
            rows.append((key, len(known.tokens), token, logprob))
            known.tokens.append(int(token))
            known.logprobs.append(float(logprob))
        if rows:
            self._write(_framed(_TOKENS, np.array(rows, _TOKEN).tobytes()))

    def complete(self, answers: Sequence[tuple[int, bool, float]]) -> None:
        """Mark answers as complete, (key, finished, reward) each; a reward that isn't known is NaN.

        Raises:
            RunError: one is complete already.
        """
        for key, finished, reward in answers:
            known = self.answers.setdefault(key, Logged())
            if known.final:
                raise RunError(f"{self.path}: answer {key} is complete already.")
            known.final, known.finished, known.reward = True, bool(finished), float(reward)
        if answers:
            self._write(_framed(_FINAL, np.array(list(answers), _FINALS).tobytes()))

    def replay(self) -> dict[int, tuple[list[int], list[float]]]:
        """Tokens and log-probabilities of every answer with at least one token, by key."""
        return {key: (list(a.tokens), list(a.logprobs)) for key, a in self.answers.items() if a.tokens}

    def sync(self) -> None:
        """Everything appended is on the disk on return."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and let go; closing twice is harmless."""
        if self._file is not None:
            self.sync()
            os.close(self._file)
            self._file = None

    def __enter__(self) -> TokenLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()


class RoundLogs:
    """The logs of a run: one file a round and rank in a folder.

    Args:
        folder: made if it isn't there.
        rank: of this process among those that sample.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder, self.rank = Path(folder), rank
        self.folder.mkdir(parents=True, exist_ok=True)

    def open(self, round: int, context: str = "") -> TokenLog:
        """This rank's log of a round, which also knows what all ranks of earlier attempts had sampled in it.

        Raises: as ``TokenLog.open``.
        """
        own = self.folder / f"round-{round:06d}.rank-{self.rank}.log"
        others = sorted(self.folder.glob(f"round-{round:06d}.rank-*.log"))
        return TokenLog.open(own, context=context, others=[path for path in others if path != own])

    def forget_before(self, round: int) -> None:
        """Remove the logs of rounds before this one: call it when a checkpoint after them is complete."""
        for path in self.folder.glob("round-*.log"):
            match = _ROUND.fullmatch(path.name)
            if match and int(match[1]) < round:
                path.unlink(missing_ok=True)


# -- frames --------------------------------------------------------------------------------------------------


def _framed(kind: int, body: bytes) -> bytes:
    body = bytes([kind]) + body
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def _frames(data: bytes) -> tuple[list[bytes], int]:
    """The whole frames at the beginning of a file, and where they end."""
    if not data.startswith(_MAGIC):
        return [], 0
    bodies, at = [], len(_MAGIC)
    while at + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + length]
        if not length or len(body) < length or zlib.crc32(body) != checksum:
            break
        bodies.append(body)
        at += _FRAME.size + length
    # Without its context nothing says whose tokens these are: a file torn in its first frame begins anew.
    return bodies, at if bodies else 0


def _digest(context: str) -> bytes:
    return hashlib.blake2b(context.encode(), digest_size=16).digest()


def _read(files: Sequence[tuple[Path, list[bytes]]], context: str) -> dict[int, Logged]:
    """What some files of one round hold together."""
    answers: dict[int, Logged] = {}
    tokens: list[tuple[Path, np.ndarray]] = []
    for path, kind, body in _bodies(files):
        if kind == _CONTEXT and body != _digest(context):
            raise DataError(
                f"{path}: the logged tokens were sampled under other settings: resume with the recipe of the run, or "
                "remove the log to sample the round anew."
            )
        if kind == _TOKENS:
            tokens.append((path, np.frombuffer(body, _TOKEN)))
        for key, digest in np.frombuffer(body, _PROMPTS).tolist() if kind == _PROMPT else ():
            known = answers.setdefault(key, Logged())
            if known.prompt not in ("", digest.decode()):
                raise CheckpointError(f"{path}: two prompts for answer {key}: {_ANEW}")
            known.prompt = digest.decode()
        for key, finished, reward in np.frombuffer(body, _FINALS).tolist() if kind == _FINAL else ():
            known = answers.setdefault(key, Logged())
            known.final, known.finished, known.reward = True, finished, reward
    _place(tokens, answers)
    return answers


_ANEW = "the log is damaged; remove the round's logs to sample it anew."


def _bodies(files: Sequence[tuple[Path, list[bytes]]]) -> Iterator[tuple[Path, int, bytes]]:
    for path, bodies in files:
        for body in bodies:
            yield path, body[0], body[1:]


def _place(found: list[tuple[Path, np.ndarray]], answers: dict[int, Logged]) -> None:
    """Give each answer its tokens in order; the files of several attempts may each hold some of them."""
    if not found:
        return
    table = np.concatenate([rows for _, rows in found])
    origin = np.repeat(np.arange(len(found)), [len(rows) for _, rows in found])
    order = np.lexsort((table["place"], table["key"]))
    table, origin = table[order], origin[order]
    starts = np.flatnonzero(np.r_[True, table["key"][1:] != table["key"][:-1]])
    expected = np.arange(len(table)) - np.repeat(starts, np.diff(np.r_[starts, len(table)]))
    wrong = np.flatnonzero(table["place"] != expected)
    if len(wrong):
        row, path = table[wrong[0]], found[origin[wrong[0]]][0]
        what = "is there twice" if row["place"] < expected[wrong[0]] else "is there, but not all before it"
        raise CheckpointError(f"{path}: token {row['place']} of answer {row['key']} {what}: {_ANEW}")
    for start, stop in zip(starts, np.r_[starts[1:], len(table)]):
        known = answers.setdefault(int(table["key"][start]), Logged())
        known.tokens = table["token"][start:stop].tolist()
        known.logprobs = table["logprob"][start:stop].tolist()
