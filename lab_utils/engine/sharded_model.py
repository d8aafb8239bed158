"""A model's weights into one folder in transformers' layout, each rank writing what it holds.

In a safetensors file a tensor's bytes stand in one run, and the rows of its first dimension one after the other: a rank
that holds a run of experts writes them at their place in the file of the whole stacked tensor, on the file system that
the ranks share. Nobody gathers, and the result is the same file whatever the layout.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import _TYPES as DTYPES
from torch import Tensor

from lab_utils.engine.reduce import gather_objects
from lab_utils.engine.rows import Rows
from lab_utils.models.load import SHARD_BYTES

CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A whole tensor and where its bytes stand."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def row_bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape[1:]:
            size *= length
        return size

    @property
    def bytes(self) -> int:
        return self.row_bytes * (self.shape[0] if self.shape else 1)


class ShardedFiles:
    """The files of a model, whole or spread over ranks; making one is collective, its methods are not.

    This rank's share is copied to host memory: what is written later is the model of now.

    Args:
        model: this rank's part; a parameter marked with ``rows`` is a run of a whole tensor's rows.
        writes: whether this rank is the one among those with the same rows that writes them.
    """

    def __init__(self, model: torch.nn.Module, writes: Callable[[Tensor], bool]) -> None:
        state = model.state_dict(keep_vars=True)
        first: dict[int, str] = {}  # a tied weight stands once, under its first name
        for name, tensor in state.items():
            first.setdefault(id(tensor), name)
        own = {name: state[name] for name in first.values() if writes(state[name])}
        mine = [
            (name, CODES[t.dtype], (Rows.of(t).total, *t.shape[1:]) if t.ndim else ())
            for name, t in own.items()
        ]
        known = {name: (code, shape) for part in gather_objects(mine) for name, code, shape in part}
        self._files, self._entries = _lay_out(known)
        self._own = {name: (Rows.of(t).start, host_copy(t)) for name, t in own.items()}

    @property
    def names(self) -> list[str]:
        """Of all files of tensors, the same on every rank."""
        return list(self._files)

    def create(self, folder: Path) -> None:
        """Headers and room for every tensor, and the index where there are several files; one rank does it.

        Others may have written their rows before.
        """
        for file, entries in self._files.items():
            header = _header(entries)
            with _opened(folder / file) as handle:
                _write_all(handle, memoryview(header), 0)
                os.ftruncate(handle, len(header) + sum(e.bytes for e in entries))
        if len(self._files) > 1:
            tree = {
                "metadata": {"total_size": sum(e.bytes for e in self._entries.values())},
                "weight_map": {e.name: e.file for e in self._entries.values()},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(tree, indent=2) + "\n")

    def write(self, folder: Path) -> None:
        """This rank's rows to their places, synced to disk, each copy given back on the way."""
        for file, entries in self._files.items():
            own = [entry for entry in entries if entry.name in self._own]
            if not own:
                continue
            begin = len(_header(entries))
            with _opened(folder / file) as handle:
                for entry in own:
                    start, tensor = self._own.pop(entry.name)
                    _write_all(handle, _bytes(tensor), begin + entry.offset + start * entry.row_bytes)


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory, also of a tensor that is there already: training goes on in place."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        try:  # locked memory, which devices copy to fastest
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        except RuntimeError:  # no more of it may be locked
            pass
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file of whole tensors in host memory, synced to disk.

    safetensors makes files that only their owner may read; what the umask allows cannot be asked for beside other
    threads, since asking sets it for all of them.
    """
    entries = _one_after_another(path.name, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    header = _header(entries)
    with _opened(path) as handle:
        _write_all(handle, memoryview(header), 0)
        for entry in entries:
            _write_all(handle, _bytes(tensors[entry.name]), len(header) + entry.offset)


def _lay_out(
    known: dict[str, tuple[str, tuple[int, ...]]],
) -> tuple[dict[str, list[Entry]], dict[str, Entry]]:
    """Tensors to files of at most SHARD_BYTES (a larger tensor has one of its own), by name order on every rank."""
    runs: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    size = 0
    for name in sorted(known):
        code, shape = known[name]
        one = Entry(name, DTYPES[code], shape, "", 0)
        if runs[-1] and size + one.bytes > SHARD_BYTES:
            runs.append([])
            size = 0
        runs[-1].append((name, one.dtype, shape))
        size += one.bytes
    files: dict[str, list[Entry]] = {}
    for i, run in enumerate(runs, 1):
        file = "model.safetensors" if len(runs) == 1 else f"model-{i:05d}-of-{len(runs):05d}.safetensors"
        files[file] = _one_after_another(file, run)
    return files, {entry.name: entry for entries in files.values() for entry in entries}


def _one_after_another(file: str, run: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> list[Entry]:
    """Places in one file; wide dtypes first, so that every tensor is aligned."""
    offset, entries = 0, []
    for name, dtype, shape in sorted(run, key=lambda item: -item[1].itemsize):
        entries.append(Entry(name, dtype, shape, file, offset))
        offset += entries[-1].bytes
    return entries


def _header(entries: list[Entry]) -> bytes:
    """safetensors' header: its length in 8 bytes, then JSON padded to a multiple of 8."""
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        tree[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.offset, entry.offset + entry.bytes],
        }
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file to write at any place of, made if need be; synced to disk at the end."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        yield handle
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _write_all(handle: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(handle, data, at)
        data, at = data[done:], at + done
