"""Bytes: reading JSONL and Parquet by rows, checking files against hashes, making generated files once."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.errors import DataError

if TYPE_CHECKING:
    from lab_utils.data.manifest import GeneratedSource

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
Row = dict[str, Any]


def cache_root() -> Path:
    """Where everything that can be made again is kept: ASCENT_CACHE, by default ~/.cache/ascent."""
    return Path(os.environ.get("ASCENT_CACHE") or Path.home() / ".cache" / "ascent")


# -- reading -------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row with its place (``train.jsonl line 7``, ``train.parquet row 7``; both count from 1).

    Raises:
        DataError: unknown ending, truncated or damaged file, a line that is no JSON object.
    """
    for place, row in read_lines(path):
        if isinstance(row, str):
            raise DataError(f"{place}: {row}: correct or remove the line.")
        yield place, row


def read_lines(path: Path) -> Iterator[tuple[str, Row | str]]:
    """As ``read_rows``, but a line that is no JSON object comes as text that says why."""
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_jsonl(path)
    else:
        raise DataError(f"{path}: unknown kind of file, expected one that ends in {', '.join(ENDINGS)}.")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row | str]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path.name} line {number}", _parse(line)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; restore it or correct the path.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: truncated or damaged gzip after line {number} ({error}); copy the file again."
        ) from None


def _parse(line: bytes) -> Row | str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        return f"not valid JSON ({error.msg} at column {error.colno})"
    return row if isinstance(row, dict) else f"expected a JSON object, found {type(row).__name__}"


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise DataError(f"{path}: there is no such file; restore it or correct the path.")
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise DataError(
            f"{path}: not a whole Parquet file, row {number + 1} cannot be read ({reason}); copy the file "
            "again."
        ) from None


def uniform(row: Row, seed: int) -> float:
    """A number in [0, 1) that depends on the row's content and the seed only."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "big")).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


# -- checksums -----------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, sha256: str, size: int, name: str, *, remembered: bool = True) -> None:
    """Compare a file with its manifest.

    Args:
        path: the file.
        sha256: expected hash.
        size: expected bytes.
        name: the manifest's, for the message.
        remembered: accept an earlier check of the same inode, size and times (in nanoseconds, and the change
            time, which no program can set) without reading the bytes again: ranks check a large file once.

    Raises:
        DataError: missing, of another size or content; names file, expected and found.
    """
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path}: the file is missing, but manifest {name} expects {size} bytes with sha256 "
            f"{sha256[:16]}…: "
            "restore it."
        ) from None
    if stat.st_size != size:
        raise DataError(
            f"{path}: expected {size} bytes (manifest {name}), found {stat.st_size}: restore the file, "
            "or change the manifest if the change is meant."
        )
    note = _memory(path, stat, sha256)
    if remembered and note.exists():
        return
    found = sha256_of(path)
    if found != sha256:
        raise DataError(
            f"{path}: expected sha256 {sha256[:16]}… (manifest {name}), found {found[:16]}…: restore the "
            "file, "
            "or change the manifest if the change is meant."
        )
    # A file changed just now could change again within one tick of its clock: not remembered.
    if time.time() - max(stat.st_mtime, stat.st_ctime) > 2:
        _touch(note)


def _memory(path: Path, stat: os.stat_result, sha256: str) -> Path:
    identity = (
        str(path.resolve()),
        stat.st_dev,
        stat.st_ino,
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
        sha256,
    )
    return cache_root() / "verified" / hashlib.sha256(repr(identity).encode()).hexdigest()


def _touch(note: Path) -> None:
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


# -- generated files -----------------------------------------------------------------------------------------


def generated_file(name: str, source: GeneratedSource) -> Path:
    """The file that a generator yields: cached, or made now, verified and renamed into place.

    Raises:
        DataError: no such generator, or it gives other bytes than the manifest says.
    """
    path = cache_root() / "generated" / f"{source.generator}-{source.sha256[:20]}.jsonl"
    with suppress(DataError):
        check_file(path, source.sha256, source.bytes, name)
        return path
    with locked(path):
        try:
            check_file(path, source.sha256, source.bytes, name)
        except DataError:  # damaged, or not made by another process meanwhile
            _generate(name, source, path)
    return path


def _generate(name: str, source: GeneratedSource, path: Path) -> None:
    from lab_utils.data import generated

    with writing(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".making")
    os.close(handle)
    try:
        with writing(path):
            found = generated.write_jsonl(temporary, source.generator, source.arguments, source.seed)
        for key in ("rows", "bytes", "sha256"):
            expected = getattr(source, key)
            if found[key] != expected:
                raise DataError(
                    f"Generator '{source.generator}' with {source.arguments}, seed {source.seed}: expected "
                    f"{key} {expected} (manifest {name}), found {found[key]}: restore the generator, or "
                    "raise the manifest's version with the new numbers."
                )
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; on file systems without locks several do the same work, and one rename wins."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = (path.parent / f"{path.name}.lock").open("w")
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full or read-only disk as one sentence."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path.parent}: the cache cannot be written ({error.strerror or error}): free space there, "
            "or set ASCENT_CACHE to another folder."
        ) from None
