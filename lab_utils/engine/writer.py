"""Checkpoints beside training: each rank's share is written by a thread of its own, once it is in host memory.

Training uses the groups of ranks meanwhile, so no thread takes part in a collective. Threads tell each other through
small files in the hidden folder, each put in its place by rename::

    ranks/written-00003.json    rank 3 has written its share: bytes and sha256 of its own files
    ranks/go-00000.json         every rank has
    ranks/hashed-00003.json     rank 3 has hashed its part of the model's files, in which several ranks wrote
    ranks/failed.json           a rank could not, and why

Rank 0 makes the checkpoint of what it hears; that ``ranks/`` is gone tells the others that their work is done. What
came of it is settled by the main threads together, in ``finish``.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lab_utils.engine import checkpoint
from lab_utils.engine.checkpoint import RANKS, Share
from lab_utils.engine.reduce import gather_objects
from lab_utils.errors import CheckpointError

PEER_SECONDS = 3600.0  # a thread waits this long for word from another rank
LAST_SECONDS = 300.0  # a run that fails waits this long for the checkpoint under way
LOOK_SECONDS = 1.0  # main threads that wait compare notes this often
PAUSES = (0.01, 1.0)  # seconds between looks for a file: at first, and in the end


class GivenUp(Exception):
    """There is nothing more to do for a checkpoint that another rank could not write, or that is done."""


class Words:
    """What the threads of the ranks tell each other about one checkpoint.

    Args:
        folder: ``ranks/``; rank 0 removes it at the end.
        stop: set when nobody is to wait any longer.
    """

    def __init__(self, folder: Path, rank: int, stop: threading.Event) -> None:
        self.folder, self.rank, self.stop = folder, rank, stop

    def tell(self, word: str, content: Any = None) -> None:
        """Raises OSError, and GivenUp where the folder is gone."""
        self._put(f"{word}-{self.rank:05d}.json", content)

    def hear(self, word: str, ranks: int) -> list[Any]:
        """What the first so many ranks said; raises GivenUp if one failed, TimeoutError."""
        paths = [self.folder / f"{word}-{rank:05d}.json" for rank in range(ranks)]
        for rank, path in enumerate(paths):
            self._wait(path.exists, f"rank {rank} has not said '{word}'")
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def until_gone(self) -> None:
        self._wait(lambda: not self.folder.exists(), "rank 0 has not completed the checkpoint")

    def fail(self, problem: str) -> None:
        """Tell of a failure, as far as that can be written: the main threads hear of it anyhow."""
        try:
            self._put("failed.json", f"rank {self.rank}: {problem}")
        except (OSError, GivenUp):
            return

    def _put(self, name: str, content: Any) -> None:
        half = self.folder / f".{name}.{self.rank}"
        try:
            half.write_text(json.dumps(content), encoding="utf-8")
            os.replace(half, self.folder / name)
        except FileNotFoundError:
            self._gone()

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        (pause, longest), end = PAUSES, time.monotonic() + PEER_SECONDS
        while not ready():
            if self.stop.is_set() or (self.folder / "failed.json").exists():
                raise GivenUp
            if not self.folder.exists():
                self._gone()
            if time.monotonic() > end:
                raise TimeoutError(f"{what} in {PEER_SECONDS:.0f} s")
            self.stop.wait(pause)
            pause = min(1.5 * pause, longest)

    def _gone(self) -> None:
        if self.rank == 0:
            raise FileNotFoundError(f"{self.folder} was removed")
        raise GivenUp


class Writer:
    """The checkpoints of one rank; at most one of them is under way. ``failed`` and ``look`` may be called any time,
    ``start`` and ``finish`` on all ranks together.

    Args:
        root: the run's ``checkpoints`` folder.
        keep_last: complete checkpoints that stay.
        completed: told of a checkpoint that is complete, in the main thread of rank 0.
    """

    def __init__(
        self, root: Path, *, rank: int, ranks: int, keep_last: int, completed: Callable[[Path], None]
    ) -> None:
        self.root, self.rank, self.ranks, self.keep_last = root, rank, ranks, keep_last
        self._completed = completed
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._final = root
        self._problem: str | None = None
        self._done: Path | None = None  # complete, and not told yet

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its share of the checkpoint under way."""
        return self._problem is not None

    def start(self, step: int, **share: Any) -> None:
        """Copy everything to host memory and begin to write it, when the checkpoint before is complete.

        Args:
            share: arguments of ``checkpoint.Share``.

        Raises:
            CheckpointError: as ``finish`` does, of the checkpoint before or if this one cannot be begun.
        """
        self.finish()
        self._final, problem = checkpoint.folder(self.root, step), None
        if self.rank == 0:
            try:
                checkpoint.make_partial(self._final)
            except OSError as error:
                problem = str(error)
        self._agree(gather_objects(problem))
        self._stop = threading.Event()
        work = Share(self.rank, **share)
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Tell of a checkpoint that has become complete."""
        if self._done is not None:
            done, self._done = self._done, None
            self._completed(done)

    def finish(self) -> None:
        """Wait until the checkpoint under way is complete on all ranks.

        Raises:
            CheckpointError: on every rank, if any could not write; what was written is removed and older ones are
                intact.
        """
        if self._thread is None:
            return
        while True:
            # Main threads meet every second: in a collective alone, the fast ones could run into its time limit.
            self._thread.join(LOOK_SECONDS)
            found = gather_objects((self._thread.is_alive(), self._problem))
            if any(problem for _, problem in found):
                self._stop.set()
            if not any(alive for alive, _ in found):
                break
        self._thread, self._problem = None, None
        self.look()
        self._agree([problem for _, problem in found])

    def leave(self) -> None:
        """For a run that ends by an exception: wait for the checkpoint under way as long as the other ranks, of whom
        some may be dead, do their part."""
        if self._thread is None:
            return
        self._thread.join(LAST_SECONDS)
        over = not self._thread.is_alive()
        self._stop.set()
        self._thread = None
        self.look()
        if self.rank == 0 and over:
            shutil.rmtree(checkpoint.partial(self._final), ignore_errors=True)

    def _agree(self, problems: list[str | None]) -> None:
        """All ranks go on, or all stop with the same sentence."""
        worst = next((rank for rank, problem in enumerate(problems) if problem), None)
        if worst is None:
            return
        if self.rank == 0:
            shutil.rmtree(checkpoint.partial(self._final), ignore_errors=True)
        raise CheckpointError(
            f"{self._final}: rank {worst} could not write the checkpoint ({problems[worst]}); earlier checkpoints are "
            f"intact: make room on that disk, then resume the run."
        )

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self, work: Share) -> None:
        """Whatever goes wrong comes back as text: other ranks wait for the verdict."""
        words = Words(checkpoint.partial(self._final) / RANKS, self.rank, self._stop)
        try:
            self._write(work, words)
        except GivenUp:
            pass
        except (OSError, SafetensorError) as error:
            self._problem = str(error) or type(error).__name__
        except Exception as error:  # a defect, or a library that raises no OSError for a full disk
            traceback.print_exc()
            self._problem = f"{type(error).__name__}: {error}"
        if self._problem:
            words.fail(self._problem)
        if self.rank == 0:
            shutil.rmtree(words.folder, ignore_errors=True)

    def _write(self, work: Share, words: Words) -> None:
        target = checkpoint.partial(self._final)
        words.tell("written", work.write(target))
        if self.rank == 0:
            described = words.hear("written", self.ranks)
            words.tell("go")
        else:
            words.hear("go", 1)
        words.tell("hashed", work.describe(target, self.ranks))
        if self.rank:
            words.until_gone()
            return
        described += words.hear("hashed", self.ranks)
        known = {name: entry for files in described for name, entry in files.items()}
        checkpoint.publish(self._final, known, self.keep_last)
        self._done = self._final
