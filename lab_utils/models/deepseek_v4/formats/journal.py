"""The folder a conversion grows in: ``DST.incomplete`` with a journal of its finished files, renamed when complete."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab_utils.errors import CheckpointError

NAME = "conversion.jsonl"


class Journal:
    """Owns ``DST.incomplete`` while a conversion runs.

    Attributes:
        folder: where the files go.
        finished: by file name, what an earlier attempt at the same conversion told of its finished files.

    Raises:
        CheckpointError: the destination is taken, another process is at it, or the folder holds another conversion.
    """

    def __init__(self, destination: Path, identity: dict[str, Any]):
        self.destination = destination
        self.folder = destination.with_name(f"{destination.name}.incomplete")
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise CheckpointError(
                f"{destination}: already there and not empty; choose another folder or remove it."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"{self.folder}: another conversion is writing there; wait for it to end."
            ) from None
        try:
            self.finished = self._read(identity)
        except BaseException:
            self.close()
            raise
        for leftover in self.folder.glob(".*.safetensors.*"):
            leftover.unlink()

    def add(self, told: dict[str, Any]) -> None:
        """Records a finished file."""
        self._line(told)

    def complete(self) -> None:
        """Gives the folder its name and removes the journal."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        if self.destination.exists():
            self.destination.rmdir()
        os.replace(self.folder, self.destination)
        (self.destination / NAME).unlink()

    def close(self) -> None:
        """Lets the next attempt in."""
        self._file.close()

    def _read(self, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
        entries, whole = [], 0
        for line in self._lines():
            if not line.endswith("\n"):
                break  # being written when the process died
            entries.append(json.loads(line))
            whole += len(line)
        self._file.truncate(whole)
        if not entries:
            if any(p.suffix == ".safetensors" for p in self.folder.iterdir()):
                raise CheckpointError(
                    f"{self.folder}: has files but no journal; remove the folder, or choose another destination."
                )
            self._line(identity)
        elif entries[0] != json.loads(json.dumps(identity)):
            raise CheckpointError(
                f"{self.folder}: holds an unfinished conversion of another source or with other options; finish it "
                "with its own command, remove the folder, or choose another destination."
            )
        return {entry["file"]: entry for entry in entries[1:]}

    def _lines(self) -> list[str]:
        self._file.seek(0)
        return self._file.read().splitlines(keepends=True)

    def _line(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def disk_full_explained(folder: Path, doing: str) -> Iterator[None]:
    """A full disk, or a spent quota, within the block becomes a CheckpointError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"{folder}: the disk is full, while {doing}; make room and run the same command again, what is finished "
            "is kept."
        ) from None
