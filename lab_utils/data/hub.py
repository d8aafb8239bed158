"""Public sets of the hub: pinned by commit and by the hash of every file, or refused.

Nothing here guesses: ``pin`` asks the hub, on a connected machine, which commit is current, which files a
split consists of (through ``datasets``, which knows the layouts), and what they hash to. Afterwards the files
are read from the hub's cache, offline too, and checked like any other file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.data.sources import sha256_of
from lab_utils.errors import DataError

if TYPE_CHECKING:
    from lab_utils.data.manifest import HubSource, Manifest

# What reads a file, by how its name ends.
READERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".json.gz": "json",
    ".csv": "csv",
}


def local_files(name: str, source: HubSource) -> list[tuple[Path, str, int]]:
    """The pinned files with their expected sha256 and bytes, from the hub's cache or downloaded into it.

    Raises:
        DataError: not pinned, or not in the cache and not to be had.
    """
    if not source.pinned:
        raise DataError(
            f"{name} ({source.id}) is not pinned to a revision with hashes, so what it holds is unknown: "
            f"run `lab data pin {name}` on a connected machine."
        )
    from huggingface_hub import hf_hub_download

    found = []
    for file in source.files:
        try:
            local = hf_hub_download(source.id, file.path, repo_type="dataset", revision=source.revision)
        except (
            Exception
        ) as error:  # the hub's client raises many kinds; each means that the file cannot be had
            raise DataError(
                f"{name}: {source.id}/{file.path} at {source.revision[:12]} is not in the hub's cache and "
                "cannot be "
                f"fetched ({_reason(error)}): run `lab data verify {name}` on a connected machine that "
                "shares HF_HOME."
            ) from None
        found.append((Path(local), file.sha256, file.bytes))
    return found


def rows(name: str, source: HubSource, files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of verified files with their places, through ``datasets.load_dataset``.

    Streamed: no second copy of the set in another cache, and nothing there that could differ from what was
    verified.
    """
    import datasets

    kinds = {_reader(name, file) for file in files}
    if len(kinds) != 1:
        raise DataError(
            f"{name}: {source.id} mixes kinds of files ({', '.join(sorted(kinds))}); expected one."
        )
    label = f"{source.id}[{source.split}]"
    try:
        loaded = datasets.load_dataset(
            kinds.pop(), data_files=[str(file) for file in files], split="train", streaming=True
        )
        for number, row in enumerate(loaded, 1):
            yield f"{label} row {number}", row
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160]
        raise DataError(
            f"{label}: cannot be read ({reason}); pin the set again: lab data pin {name}."
        ) from None


def _reader(name: str, file: Path) -> str:
    for ending, kind in READERS.items():
        if file.name.endswith(ending):
            return kind
    raise DataError(f"{name}: {file.name} is of an unknown kind, expected one of {', '.join(READERS)}.")


# -- pinning -------------------------------------------------------------------------------------------------


def pin(manifest: Manifest) -> Manifest:
    """The manifest with commit, files, sizes and hashes of its hub splits as they are now.

    Raises:
        DataError: no hub split, no connection, no access, or no such config or split.
    """
    from lab_utils.data.manifest import HubFile, HubSource

    if not any(isinstance(source, HubSource) for source in manifest.splits.values()):
        raise DataError(f"{manifest.name} has no split on the hub, so there is nothing to pin.")
    splits: dict[str, Any] = dict(manifest.splits)
    commits: dict[str, str] = {}  # one commit for all splits of a repository
    for split, source in manifest.splits.items():
        if not isinstance(source, HubSource):
            continue
        try:
            commit = commits.setdefault(source.id, "") or _commit(source.id)
            commits[source.id] = commit
            paths = split_files(source, commit)
            found = _hashes(source.id, paths, commit)
        except DataError:
            raise
        except Exception as error:  # as above: whatever the client raises, the set cannot be pinned from here
            raise DataError(
                f"{manifest.name}: the hub gives no answer about {source.id} ({_reason(error)}): run "
                f"`lab data pin {manifest.name}` on a connected machine that may read the set "
                "(HF_HUB_OFFLINE=0, HF_TOKEN)."
            ) from None
        files = tuple(HubFile(path=path, sha256=sha256, bytes=size) for path, sha256, size in found)
        splits[split] = source.model_copy(update={"revision": commit, "files": files})
    return manifest.model_copy(update={"splits": splits})


def _commit(repository: str) -> str:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repository).sha


def split_files(source: HubSource, commit: str) -> list[str]:
    """Paths, inside the repository, of the files of a split.

    Raises:
        DataError: no such split.
    """
    import datasets

    builder = datasets.load_dataset_builder(source.id, name=source.config, revision=commit)
    by_split = builder.config.data_files or {}
    if source.split not in by_split:
        raise DataError(
            f"{source.id} has no split '{source.split}' of files, found "
            f"{', '.join(map(str, by_split)) or 'none'}: "
            "correct the manifest."
        )
    return [str(url).split(f"@{commit}/", 1)[-1] for url in by_split[source.split]]


def _hashes(repository: str, paths: list[str], commit: str) -> list[tuple[str, str, int]]:
    """Path, sha256 and bytes of files; the hub knows the hash of large ones, small ones are fetched."""
    from huggingface_hub import HfApi, hf_hub_download

    known = {
        entry.path: entry
        for entry in HfApi().get_paths_info(repository, paths, repo_type="dataset", revision=commit)
    }
    found = []
    for path in paths:
        entry = known[path]
        if entry.lfs:
            found.append((path, entry.lfs.sha256, entry.size))
        else:
            local = Path(hf_hub_download(repository, path, repo_type="dataset", revision=commit))
            found.append((path, sha256_of(local), local.stat().st_size))
    return found


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__
