"""The reference's log-probability of every token of a data set: computed once, before training, and kept beside it.

Then no second model is in memory while the first one trains. The numbers are named by what they come from: the tokens'
store (data, tokenizer, encoding) and the bytes of the reference's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from lab_utils.engine.frozen import frozen, release
from lab_utils.engine.reduce import gather_objects
from lab_utils.errors import RunError

WHOLE_FILE, BLOCK, BLOCKS = 1 << 28, 1 << 16, 256  # of larger files so many blocks are hashed, evenly spread


def reference_logps(
    source: str, loaders: list[Any], engine: Any, tell: Callable[[str], None] = lambda sentence: None
) -> list[np.ndarray]:
    """For each loader of pairs, an array aligned with the tokens of its store, mapped from the cache.

    Args:
        source: the reference's weights, as ``model.source``.
        loaders: ``PairLoader``.
        engine: gives layout, device and recipe.
        tell: gets a sentence when there is something to compute.

    Raises:
        RunError: the ranks do not share the folder of the cache.
    """
    identity = identity_of(source, engine.recipe)
    paths = [loader.reference_path(identity) for loader in loaders]
    missing = [not path.exists() for path in paths]
    missing = [any(column) for column in zip(*gather_objects(missing), strict=True)]
    if any(missing):
        tell(f"log-probabilities of the reference {source}, once for this data and these weights")
        reader = frozen(source, engine.recipe, engine.layout, engine.device)
        for loader, path, wanted in zip(loaders, paths, missing, strict=True):
            if wanted:
                _compute(reader, loader, path, engine)
        release(reader)
    found = []
    for path in paths:
        if not path.exists():
            raise RunError(
                f"{path} was written by another rank and is not here: ranks on several nodes need one cache; point "
                "ASCENT_CACHE to a folder that all of them share."
            )
        found.append(np.load(path, mmap_mode="r"))
    return found


def _compute(reader: Any, loader: Any, path: Path, engine: Any) -> None:
    """Each rank's share, put together by the first; the file appears whole or not at all."""
    layout = engine.layout
    batches = list(
        loader.reference_batches(
            layout.dp_rank, layout.dp_size, engine.recipe.data.row_tokens, engine.micro_rows
        )
    )
    rows = [each.to(engine.device) for each, _ in batches]
    values = reader.token_logps(rows)
    mine = [(places, found.cpu().numpy()) for (_, places), found in zip(batches, values, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    piece = path.with_name(f".{path.name}.{dist.get_rank()}.npz")
    if layout.first_stage:
        where = [places >= 0 for places, _ in mine]
        np.savez(
            piece,
            places=np.concatenate(
                [p[w] for (p, _), w in zip(mine, where, strict=True)] or [np.zeros(0, np.int64)]
            ),
            values=np.concatenate(
                [v[w] for (_, v), w in zip(mine, where, strict=True)] or [np.zeros(0, np.float32)]
            ),
        )
    dist.barrier()
    if dist.get_rank() == 0:
        whole = np.zeros(loader.store_tokens, np.float32)
        for each in sorted(path.parent.glob(f".{path.name}.*.npz")):
            with np.load(each) as part:
                whole[part["places"]] = part["values"]
            each.unlink()
        staged = path.with_name(f".{path.name}.npy")
        np.save(staged, whole)
        staged.rename(path)
    dist.barrier()


def identity_of(source: str, recipe: Any) -> str:
    """Hex digits that change when the weights of a source do (and their precision).

    Small files are hashed whole; of files beyond 256 MiB size, header and 256 blocks spread over them.
    """
    digest = hashlib.sha256(recipe.model.dtype.encode())
    if source.startswith("preset:"):
        digest.update(repr((source, recipe.seed)).encode())
        return digest.hexdigest()[:16]
    from lab_utils.models.load import checkpoint_folder

    for path in sorted(checkpoint_folder(source).iterdir()):
        if path.suffix in (".safetensors", ".json"):
            _hash_file(path, digest)
    return digest.hexdigest()[:16]


def _hash_file(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}".encode())
    with path.open("rb") as file:
        if size <= WHOLE_FILE:
            digest.update(file.read())
            return
        for i in range(BLOCKS):
            file.seek(i * (size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
