"""A model's weights into one folder in transformers' layout, each rank writing what it holds.

In a safetensors file a tensor's bytes stand in one run, and the rows of its first dimension one after the other: a rank
that holds a run of experts writes them at their place in the file of the whole stacked tensor, on the file system that
the ranks share. Nobody gathers, and the result is the same file whatever the layout.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
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
    """The files of a model that is spread over ranks; making one is collective, its methods are not.

    Args:
        model: this rank's part; a parameter marked with ``rows`` is a run of a whole tensor's rows.
        writes: whether this rank is the one among those with the same rows that writes them.
    """

    def __init__(self, model: torch.nn.Module, writes: Callable[[Tensor], bool]) -> None:
        state = model.state_dict(keep_vars=True)
        self._own = {name: tensor for name, tensor in state.items() if writes(tensor)}
        mine = [
            (name, CODES[t.dtype], (Rows.of(t).total, *t.shape[1:]) if t.ndim else ())
            for name, t in self._own.items()
        ]
        known = {name: (code, shape) for part in gather_objects(mine) for name, code, shape in part}
        self._files, self._entries = _lay_out(known)

    def create(self, folder: Path) -> None:
        """Headers and empty room for every tensor, and the index where there are several files; one rank does it."""
        for file, entries in self._files.items():
            header = _header(entries)
            with (folder / file).open("wb") as handle:
                handle.write(header)
                handle.truncate(len(header) + sum(e.bytes for e in entries))
        if len(self._files) > 1:
            tree = {
                "metadata": {"total_size": sum(e.bytes for e in self._entries.values())},
                "weight_map": {e.name: e.file for e in self._entries.values()},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(tree, indent=2) + "\n")

    def write(self, folder: Path) -> None:
        """This rank's rows, tensor by tensor, into files that ``create`` made."""
        starts = {file: len(_header(entries)) for file, entries in self._files.items()}
        handles = {file: os.open(folder / file, os.O_WRONLY) for file in self._files}
        try:
            for name, tensor in self._own.items():
                entry = self._entries[name]
                at = starts[entry.file] + entry.offset + Rows.of(tensor).start * entry.row_bytes
                _write_all(handles[entry.file], tensor.detach(), at)
            for handle in handles.values():
                os.fsync(handle)
        finally:
            for handle in handles.values():
                os.close(handle)


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
        offset, files[file] = 0, []
        # Wide dtypes first, so that every tensor is aligned.
        for name, dtype, shape in sorted(run, key=lambda item: -item[1].itemsize):
            files[file].append(Entry(name, dtype, shape, file, offset))
            offset += files[file][-1].bytes
    return files, {entry.name: entry for entries in files.values() for entry in entries}


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


def _write_all(handle: int, tensor: Tensor, at: int) -> None:
    data = memoryview(tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
    while data:
        done = os.pwrite(handle, data, at)
        data, at = data[done:], at + done
