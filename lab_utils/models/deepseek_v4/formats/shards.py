"""One file of a conversion, written a few rows at a time; also what a worker process runs."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.fp8_quantize.scales import BLOCK
from lab_utils.errors import CheckpointError
from lab_utils.models.deepseek_v4.formats.files import DTYPES, FileWriter, sha256
from lab_utils.models.deepseek_v4.formats.journal import disk_full_explained
from lab_utils.models.deepseek_v4.formats.plan import Shard, Unit
from lab_utils.models.deepseek_v4.formats.quantise import hinted_scales, quantise
from lab_utils.models.deepseek_v4.formats.reader import CheckpointReader

CHUNK = 1 << 20  # numbers in work at a time, so that they stay in cache; at least a row of blocks


@dataclass
class Sources:
    """The checkpoint that is converted, and the one whose scales are tried first (often the same)."""

    reader: CheckpointReader
    hints: CheckpointReader


def write_shard(
    sources: Sources, shard: Shard, folder: Path, progress: Callable[[int], None] = lambda written: None
) -> dict[str, Any]:
    """Writes ``folder/shard.file``: ``{"file", "bytes", "sha256", "blocks", "kept"}``; the last two count scales.

    Raises:
        CheckpointError: the disk is full, or the source can't be read. The file is then not there.
    """
    counts = {"blocks": 0, "kept": 0}
    with disk_full_explained(folder, f"writing {shard.file} of {shard.nbytes / 1e9:.1f} GB"):
        writer = FileWriter(folder / shard.file, shard.slots, progress)
        try:
            for unit in shard.units:
                _write_unit(sources, writer, unit, counts)
            return writer.finish() | counts
        except BaseException:
            writer.abandon()
            raise


def _write_unit(sources: Sources, writer: FileWriter, unit: Unit, counts: dict[str, int]) -> None:
    weight, offset, scales = unit.slots[0], 0, []
    for official in unit.matrices:
        for start, stop in _chunks(sources.reader.parts[official].shape):
            if unit.quantised:
                data, scale = _quantised_rows(sources, official, start, stop, unit, counts)
                scales.append(scale)
            else:
                data = sources.reader.part(official, start, stop, DTYPES[weight.dtype])
            writer.write(weight.name, offset, data)
            offset += data.nbytes
    if unit.quantised:
        writer.write(unit.slots[1].name, 0, torch.cat(scales))


def _quantised_rows(
    sources: Sources, official: str, start: int, stop: int, unit: Unit, counts: dict[str, int]
) -> tuple[Tensor, Tensor]:
    part, kind = sources.reader.parts[official], unit.quantised
    # Numbers of a quantised source are exact in fp32, whatever its scales.
    narrow = part.stored == "dense" and part.entry.dtype == "BF16"
    x = sources.reader.part(official, start, stop, torch.bfloat16 if narrow else torch.float32)
    hint = hinted_scales(sources.hints, official, part.shape, start, stop, kind)
    try:
        found = quantise(x, kind, DTYPES[unit.slots[1].dtype], hint)
    except ValueError as error:
        raise CheckpointError(f"{part.entry.file}: tensor {official}: {error}.") from None
    counts["blocks"] += found.blocks
    counts["kept"] += found.kept
    return found.codes, found.scale


def _chunks(shape: tuple[int, ...]):
    """Runs of rows, whole blocks of them, that stay within CHUNK."""
    columns = 1
    for length in shape[1:]:
        columns *= length
    step = max(BLOCK, CHUNK // max(columns, 1) // BLOCK * BLOCK)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


_worker: dict[str, Any] = {}


def start_worker(source: str, like: str | None, folder: str, threads: int, counter: Any) -> None:
    """Initialiser of a worker process: the headers are read once."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker.update(sources=open_sources(source, like), folder=Path(folder), counter=counter)


def _end_with_parent() -> None:
    # A killed main process would leave its workers waiting for work for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def open_sources(source: str, like: str | None) -> Sources:
    """Readers of a conversion; without ``like`` a quantised source is its own hint."""
    reader = CheckpointReader(source)
    return Sources(reader, CheckpointReader(like) if like else reader)


def worker_shard(shard: Shard) -> dict[str, Any]:
    """``write_shard`` in a worker process."""

    def progress(written: int) -> None:
        with _worker["counter"].get_lock():
            _worker["counter"].value += written

    return write_shard(_worker["sources"], shard, _worker["folder"], progress)


def worker_check(told: dict[str, Any]) -> bool:
    """Whether a file of an earlier attempt is what the journal says, in a worker process."""
    return is_finished(_worker["folder"], told)


def is_finished(folder: Path, told: dict[str, Any]) -> bool:
    """Whether a file of an earlier attempt has the journal's size and checksum."""
    file = folder / told["file"]
    return file.exists() and file.stat().st_size == told["bytes"] and sha256(file) == told["sha256"]
