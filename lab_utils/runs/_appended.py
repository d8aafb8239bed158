"""A file that others append to, read as it grows: whole lines, each once; a replaced or cut file is noticed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 2**17  # bytes of one read
MAX_LINE = 2**24  # a longer line is passed over
MARK = 64  # bytes before the place that was reached, which must still be there


@dataclass
class Part:
    """What was added since the last look.

    Attributes:
        lines: offset in the file and content of each whole line, without its line break.
        afresh: the file is another one than before (replaced, cut): what was read of it is void.
        behind: there is more to read at once.
    """

    lines: list[tuple[int, bytes]] = field(default_factory=list)
    afresh: bool = False
    behind: bool = False


class Appended:
    """A growing file of lines.

    Args:
        path: it need not be there yet.
        newest: bytes at its end that are of interest; what lies before is passed over. None: all of it.
        lazily: ask only for size and time where they have not changed: cheap for very many files, but a network file
            system may answer some seconds late.
    """

    def __init__(self, path: Path, newest: int | None = None, *, lazily: bool = False):
        self.path, self.newest, self.lazily = path, newest, lazily
        self.offset = 0  # of the first byte that has not been read
        self._mark = b""
        self._file: tuple[int, int] | None = None
        self._seen: tuple[int, ...] | None = None

    def read(self, most: int = BLOCK) -> Part:
        """Whole lines from where the last look ended, about ``most`` bytes of them. Never raises for a file."""
        try:
            if self.lazily and self._seen == _look(os.stat(self.path)):
                return Part()
            with self.path.open("rb") as stream:
                return self._read(stream, most)
        except OSError:  # not there yet, moved away, a server that doesn't answer
            return Part()

    def _read(self, stream, most: int) -> Part:  # a binary file
        stat = os.fstat(stream.fileno())
        part = Part(afresh=self._replaced(stream, stat))
        if part.afresh:
            self.offset, self._mark = 0, b""
        self._file = (stat.st_dev, stat.st_ino)
        start, size = self.offset, stat.st_size
        skipped = self.newest is not None and size - start > self.newest
        if skipped:
            start = size - self.newest
        stream.seek(start)
        data = stream.read(min(most, size - start))
        while (end := data.rfind(b"\n") + 1) == 0 and start + len(data) < size and len(data) < MAX_LINE:
            data += stream.read(min(len(data) or most, size - start - len(data)))
        end = end or (len(data) if len(data) >= MAX_LINE else 0)
        # Where something was passed over, the first piece is the end of a line.
        at = data.find(b"\n", 0, end) + 1 if skipped else 0
        for line in data[at:end].split(b"\n")[:-1]:
            part.lines.append((start + at, line))
            at += len(line) + 1
        self.offset = start + end
        self._mark = (self._mark + data[:end])[-MARK:]
        part.behind = end > 0 and self.offset < size
        self._seen = None if part.behind else _look(stat)
        return part

    def _replaced(self, stream, stat: os.stat_result) -> bool:
        if self._file is None or self.offset == 0:
            return False
        if self._file != (stat.st_dev, stat.st_ino) or stat.st_size < self.offset:
            return True
        stream.seek(self.offset - len(self._mark))
        return stream.read(len(self._mark)) != self._mark


def _look(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
