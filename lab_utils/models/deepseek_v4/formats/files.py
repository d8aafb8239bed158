"""safetensors files by byte ranges: read any rows of a tensor, write a file larger than memory.

The format is an 8-byte little-endian length, a JSON header of that length and the tensors' bytes without gaps. The
library maps a file into memory, where every page touched counts as resident, and writes it from tensors that are all in
memory; a conversion wants neither. Reading by ``pread`` also turns a truncated file into an error instead of a signal.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab_utils.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_LARGEST_READ = 1 << 30


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: ``start`` is its first byte, counted from the beginning of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


def read_header(file: Path) -> dict[str, Entry]:
    """Tensors of a safetensors file by name, the sizes checked against the file's.

    Raises:
        CheckpointError: a missing, truncated or damaged file, or a dtype that no DeepSeek-V4 checkpoint has.
    """
    try:
        found = file.stat().st_size
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size)) if 2 <= size <= found - 8 else None
        if not isinstance(header, dict):
            raise ValueError
        header.pop("__metadata__", None)
        entries = {name: _entry(file, name, told, 8 + size) for name, told in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; copy the checkpoint again.") from None
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(
            f"{file}: truncated or damaged, its header can't be read; copy the file again."
        ) from None
    expected = max((e.start + e.nbytes for e in entries.values()), default=8 + size)
    if found != expected:
        raise CheckpointError(
            f"{file}: truncated or damaged, {found} bytes where its header says {expected}; copy the file again."
        )
    return entries


def _entry(file: Path, name: str, told: dict[str, Any], origin: int) -> Entry:
    if told["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name} is stored as {told['dtype']}; known are {', '.join(DTYPES)}."
        )
    begin, end = told["data_offsets"]
    entry = Entry(file, name, told["dtype"], tuple(told["shape"]), origin + begin)
    if entry.nbytes != end - begin:
        raise ValueError
    return entry


class ByteReader:
    """Reads byte ranges of many files, each opened once. Works after a fork or in a thread: no position is shared."""

    def __init__(self) -> None:
        self._opened: dict[Path, int] = {}
        self.bytes_read = 0

    def rows(self, entry: Entry, start: int, stop: int) -> Tensor:
        """Rows of the leading dimension as stored: ``[stop - start, …]``.

        Raises:
            CheckpointError: the file ends early.
        """
        shape = (stop - start, *entry.shape[1:])
        buffer = torch.empty((stop - start) * entry.row_bytes, dtype=torch.uint8)
        if buffer.numel():
            self._fill(entry, memoryview(buffer.numpy()), entry.start + start * entry.row_bytes)
        return buffer.view(DTYPES[entry.dtype]).view(shape)

    def close(self) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)
        self._opened.clear()

    def _fill(self, entry: Entry, buffer: memoryview, offset: int) -> None:
        if entry.file not in self._opened:
            self._opened[entry.file] = os.open(entry.file, os.O_RDONLY)
        done = 0
        while done < len(buffer):
            part = buffer[done : done + _LARGEST_READ]
            count = os.preadv(self._opened[entry.file], [part], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{entry.file}: ends inside tensor {entry.name}; the file changed, copy it again."
                )
            done += count
        self.bytes_read += done


@dataclass(frozen=True)
class Slot:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


class FileWriter:
    """Writes one safetensors file: the header first, then bytes wherever their tensor stands.

    The file has another name until ``finish``. Slots should come with the wider dtypes first: readers want a tensor's
    offset to be a multiple of its item size.
    """

    def __init__(self, file: Path, slots: list[Slot], progress: Callable[[int], None] = lambda written: None):
        self.file, self.progress = file, progress
        self.partial = file.with_name(f".{file.name}.{os.getpid()}")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        self._start: dict[str, int] = {}
        for slot in slots:
            self._start[slot.name] = begin
            ends = [begin, begin + slot.nbytes]
            header[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": ends}
            begin += slot.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        self._start = {name: len(head) + start for name, start in self._start.items()}
        self.bytes = len(head) + begin
        self._digest, self._hashed = hashlib.sha256(), 0
        self._descriptor = os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._put(memoryview(head), 0)

    def write(self, name: str, offset: int, tensor: Tensor) -> None:
        """Bytes of ``tensor`` from byte ``offset`` of the named slot on."""
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        self._put(memoryview(flat.numpy()), self._start[name] + offset)
        self.progress(flat.numel())

    def finish(self) -> dict[str, Any]:
        """The file under its own name and on the disk: ``{"file", "bytes", "sha256"}``."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        whole = self._hashed == self.bytes
        digest = self._digest.hexdigest() if whole else sha256(self.partial)
        os.replace(self.partial, self.file)
        return {"file": self.file.name, "bytes": self.bytes, "sha256": digest}

    def abandon(self) -> None:
        """Removes what was written."""
        os.close(self._descriptor)
        self.partial.unlink(missing_ok=True)

    def _put(self, data: memoryview, offset: int) -> None:
        if offset == self._hashed:  # in order: hashed on the way, not read again
            self._digest.update(data)
            self._hashed += len(data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done : done + _LARGEST_READ], offset + done)


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
