"""Conversion of a DeepSeek-V4 checkpoint from any of its formats to any other, in bounded memory, resumable.

plan every output file  ─►  write each aside, a few rows at a time  ─►  index, config.json  ─►  rename the folder
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lab_utils.errors import CheckpointError
from lab_utils.models.deepseek_v4.formats.config import official_config, transformers_config
from lab_utils.models.deepseek_v4.formats.journal import Journal, disk_full_explained
from lab_utils.models.deepseek_v4.formats.plan import TARGETS, Shard, Target, plan
from lab_utils.models.deepseek_v4.formats.reader import CheckpointReader
from lab_utils.models.deepseek_v4.formats.shards import (
    Sources,
    is_finished,
    open_sources,
    start_worker,
    worker_check,
    worker_shard,
    write_shard,
)

_NOT_COPIED = ("config.json", "conversion.json", "conversion.jsonl", "model.safetensors.index.json")
_LARGEST_COPY = 256 << 20


def convert(
    source: Path | str,
    destination: Path | str,
    to: str,
    *,
    official_names: bool = False,
    like: Path | str | None = None,
    shard_gb: float = 5.0,
    workers: int = 1,
) -> dict[str, Any]:
    """Writes the checkpoint of ``source`` to the folder ``destination`` in another format.

    Args:
        to: "bf16", "fp32" (transformers' layout), "fp8", "fp8+mxfp4", "base" (DeepSeek's names).
        official_names: DeepSeek's names for "bf16" and "fp32" too.
        like: a quantised checkpoint whose scales are kept in every block that they still represent exactly.
        shard_gb: size of the files, in 10^9 bytes; a tensor that is larger gets a file of its own.
        workers: processes, each at one file.

    Returns:
        ``source, destination, from, to, tensors, files, bytes, seconds, skipped``, and ``blocks`` and ``kept``: scales
        written, and those among them that came from ``like`` or the quantised source.

    Raises:
        CheckpointError: a source that is damaged or no DeepSeek-V4, a destination that is taken or too small. What was
            finished stays in ``DESTINATION.incomplete``; the same call goes on from there.
    """
    begun = time.monotonic()
    source, destination = Path(source), Path(destination).absolute()
    if to not in TARGETS:
        raise CheckpointError(f"--to {to}: there is no such format; choose one of {', '.join(TARGETS)}.")
    target = replace(TARGETS[to], official=TARGETS[to].official or official_names)
    sources = open_sources(str(source), str(like) if like else None)
    reader = sources.reader
    check_complete(reader)
    shards = plan(reader, target, max(1, int(shard_gb * 1e9)))
    identity = _identity(reader, to, target, sources.hints, shard_gb)
    journal = Journal(destination, identity)
    try:
        _check_room(shards, journal)
        done = _write(sources, shards, journal, workers, like)
        summary = {
            "source": str(source),
            "destination": str(destination),
            "from": reader.format,
            "to": to,
            "tensors": sum(len(shard.slots) for shard in shards),
            "files": len(shards),
            "bytes": sum(told["bytes"] for told in done),
            "skipped": reader.skipped,
            "blocks": sum(told["blocks"] for told in done),
            "kept": sum(told["kept"] for told in done),
        }
        with disk_full_explained(journal.folder, "writing the index"):
            _write_small_files(reader, target, shards, journal.folder)
            _json(journal.folder / "conversion.json", summary | {"shards": done})
        journal.complete()
    finally:
        journal.close()
    return summary | {"seconds": round(time.monotonic() - begun, 3)}


def check_complete(reader: CheckpointReader) -> None:
    """Raises CheckpointError where the main model's tensors are not those that config.json describes."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config.from_pretrained(reader.folder)
    with torch.device("meta"):
        expected = {n: tuple(t.shape) for n, t in DeepseekV4ForCausalLM(config).state_dict().items()}
    found = {name: reader.shape(name) for name in reader.names() if not name.startswith("mtp.")}
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(
                f"{reader.folder}: tensor {name} is missing, config.json asks for it; copy the checkpoint again."
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{reader.folder}: tensor {name} has shape {list(found[name])}, config.json asks for {list(shape)}; "
                "use the config.json that belongs to these weights."
            )
    surplus = next((name for name in found if name not in expected), None)
    if surplus:
        raise CheckpointError(
            f"{reader.folder}: tensor {surplus} has no place in the model of config.json; use the one that belongs "
            "to these weights."
        )


def _identity(
    reader: CheckpointReader, to: str, target: Target, hints: CheckpointReader, shard_gb: float
) -> dict[str, Any]:
    """What two attempts must share to be one conversion: options, and the source files as they are on the disk."""

    def files(of: CheckpointReader) -> list[list[Any]]:
        found = sorted({part.entry.file for part in of.parts.values()})
        return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in found]

    options = {"to": to, "official": target.official, "shard_gb": shard_gb, "version": 1}
    return options | {"source": files(reader), "like": files(hints) if hints is not reader else None}


def _check_room(shards: list[Shard], journal: Journal) -> None:
    needed = sum(shard.nbytes for shard in shards if shard.file not in journal.finished)
    free = shutil.disk_usage(journal.folder).free
    if needed > free:
        raise CheckpointError(
            f"{journal.destination.parent}: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free; "
            "make room or choose another disk."
        )


def _write(
    sources: Sources, shards: list[Shard], journal: Journal, workers: int, like: Path | str | None
) -> list[dict[str, Any]]:
    """All files, those of an earlier attempt checked and kept; what the journal tells of each, in order."""
    with _progress(sum(shard.nbytes for shard in shards)) as advance:
        if workers <= 1:
            for shard in shards:
                told = journal.finished.get(shard.file)
                if told and is_finished(journal.folder, told):
                    advance(shard.nbytes)
                    continue
                journal.finished[shard.file] = write_shard(sources, shard, journal.folder, advance)
                journal.add(journal.finished[shard.file])
        else:
            _write_parallel(sources.reader.folder, shards, journal, workers, like, advance)
    return [journal.finished[shard.file] for shard in shards]


def _write_parallel(
    source: Path,
    shards: list[Shard],
    journal: Journal,
    workers: int,
    like: Path | str | None,
    advance: Callable[[int], None],
) -> None:
    context = get_context("spawn")  # a fork would share locks of torch's threads
    counter = context.Value("q", 0)
    threads = max(1, (os.cpu_count() or 1) // workers)
    start = (str(source), str(like) if like else None, str(journal.folder), threads, counter)
    with ProcessPoolExecutor(workers, context, start_worker, start) as pool:
        pending: dict[Future, tuple[Shard, bool]] = {}
        for shard in shards:
            told = journal.finished.get(shard.file)
            future = pool.submit(worker_check, told) if told else pool.submit(worker_shard, shard)
            pending[future] = (shard, bool(told))
        seen = 0
        try:
            while pending:
                ready, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in ready:
                    shard, was_check = pending.pop(future)
                    if not was_check:
                        journal.finished[shard.file] = future.result()
                        journal.add(future.result())
                    elif future.result():
                        advance(shard.nbytes)
                    else:
                        pending[pool.submit(worker_shard, shard)] = (shard, False)
                advance(counter.value - seen)
                seen = counter.value
        except BrokenProcessPool:
            raise CheckpointError(
                f"{journal.folder}: a worker process died (out of memory?); run the same command again, with fewer "
                "--workers; the finished files are kept."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error where that is a terminal."""
    from tqdm import tqdm

    off = not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=off) as bar:
        yield lambda written: bar.update(written) and None


def _write_small_files(reader: CheckpointReader, target: Target, shards: list[Shard], folder: Path) -> None:
    placed = {slot.name: shard.file for shard in shards for unit in shard.units for slot in unit.slots}
    size = sum(shard.nbytes for shard in shards)
    _json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": placed})
    dtype = {"BF16": "bfloat16", "F32": "float32"}[target.dense]
    if target.official:
        modules = {name.split(".")[1] for name in reader.parts if name.startswith("mtp.")}
        experts = {None: None, "fp8": "fp8", "mxfp4": "fp4"}[target.expert]
        tree = official_config(reader.folder, reader.config, dtype, experts, len(modules))
    else:
        tree = transformers_config(reader.folder, reader.config, dtype)
    _json(folder / "config.json", tree)
    for file in sorted(reader.folder.iterdir()):
        small = file.is_file() and file.stat().st_size <= _LARGEST_COPY and not file.name.startswith(".")
        if small and file.name not in _NOT_COPIED and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)


def _json(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2, sort_keys=file.name == "config.json") + "\n", encoding="utf-8")
