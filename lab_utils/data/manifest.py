"""Manifests: what a data set is, where its bytes are, and what they must hash to.

One YAML file a data set, in ``data_manifests/`` (``schema.json`` there, for editors)::

    name: gsm8k
    version: "1"
    licence: MIT
    provenance: OpenAI, "Training verifiers to solve math word problems", 2021.
    format: messages                                   # messages | preference | prompt | text
    columns: {user: question, assistant: answer}       # ours: theirs (see columns.py); absent = ours already
    splits:
      train: {kind: hub, id: openai/gsm8k, config: main, split: train, revision: null}
      # {kind: file, files: [{path: train.jsonl.gz, sha256: …, bytes: …, rows: …}]}       beside the manifest
      # {kind: generated, generator: tasks_messages, arguments: {…}, seed: 1, sha256: …, bytes: …, rows: …}

``load_manifest(name).rows("train")`` yields rows in our own columns; nothing unverified gets through.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from lab_utils.data import sources
from lab_utils.data.columns import COLUMNS, Row, family_of, to_ours
from lab_utils.data.row_check import check_row
from lab_utils.errors import DataError
from lab_utils.registry import nearest

if TYPE_CHECKING:
    from lab_utils.recipe import DataSource

SHIPPED = Path(__file__).parents[2] / "data_manifests"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(Part):
    path: str = Field(description="Relative to the manifest, or absolute: .jsonl, .jsonl.gz or .parquet.")
    sha256: Sha256
    bytes: int = Field(ge=0)
    rows: int = Field(ge=0)


class Share(Part):
    """Rows whose seeded hash of content falls into [start, stop): equal rows never part."""

    seed: int = Field(ge=0)
    start: float = Field(ge=0, le=1)
    stop: float = Field(ge=0, le=1)
    rows: int = Field(ge=0, description="How many rows of the files that is.")


class FileSource(Part):
    kind: Literal["file"] = "file"
    files: tuple[FileEntry, ...] = Field(min_length=1)
    share: Share | None = Field(None, description="Only a share of the files' rows; absent: all.")


class HubFile(Part):
    path: str = Field(description="Inside the repository.")
    sha256: Sha256
    bytes: int = Field(ge=0)


class HubSource(Part):
    kind: Literal["hub"] = "hub"
    id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Repository of the data set on the hub.")
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(
        None, pattern=r"^[0-9a-f]{40}$", description="Commit; null until `lab data pin`."
    )
    files: tuple[HubFile, ...] = ()

    @property
    def pinned(self) -> bool:
        return self.revision is not None and bool(self.files)


class GeneratedSource(Part):
    kind: Literal["generated"] = "generated"
    generator: str = Field(description="A generator of lab_utils/data/generated.py.")
    arguments: dict[str, Any] = {}
    seed: int = Field(0, ge=0)
    sha256: Sha256
    bytes: int = Field(ge=0)
    rows: int = Field(ge=0)


Source = Annotated[FileSource | HubSource | GeneratedSource, Field(discriminator="kind")]
Format = Literal["messages", "preference", "prompt", "text"]


@dataclass(frozen=True)
class Problem:
    """One thing that keeps a set from being used; ``message`` is a whole sentence."""

    manifest: str
    split: str
    message: str


class Manifest(Part):
    """One data set. Made by ``load_manifest``, which knows the folder that paths are relative to."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    version: str
    licence: str = Field(description="SPDX identifier, or the name that the publisher gives.")
    provenance: str = Field(description="Who made it, from what, how; where to read about it.")
    format: Format
    columns: dict[str, str] = Field({}, description="Our column: theirs. Absent: the names are ours.")
    splits: dict[str, Source] = Field(min_length=1)
    path: Path | None = Field(None, exclude=True, description="Where it was read from; not in the file.")
    _families: tuple[str, ...] = PrivateAttr(())  # rows of these alone: see ``only``

    @model_validator(mode="after")
    def _columns_are_known(self) -> Manifest:
        known = COLUMNS[self.format]
        for column in self.columns:
            if column not in known:
                raise ValueError(
                    f"columns: '{column}' is no column of format {self.format}, "
                    f"{nearest(column, list(known))}"
                )
        return self

    # -- reading ---------------------------------------------------------------------------------------------

    def source(self, split: str) -> FileSource | HubSource | GeneratedSource:
        """Raises DataError: no such split."""
        if split not in self.splits:
            raise DataError(f"{self.name} has no split '{split}': {nearest(split, list(self.splits))}.")
        return self.splits[split]

    def only(self, families: Sequence[str]) -> Manifest:
        """The same set, of which only rows of these families are read; none: all of them."""
        if not families:
            return self
        found = self.model_copy()
        found._families = tuple(families)
        return found

    def rows(self, split: str) -> Iterator[Row]:
        """Rows in our columns, each checked, from files whose checksum has been checked before the first row.

        Raises:
            DataError: no such split; a missing file, a wrong checksum, size or number of rows; a malformed
            row (by
                line number); a hub set that is not pinned.
        """
        return (row for _, row in self.located_rows(split))

    def located_rows(self, split: str) -> Iterator[tuple[str, Row]]:
        """As ``rows``, with the place of each: ``train.jsonl line 7``."""
        found: set[str] = set()
        for place, theirs in self._raw_rows(split):
            try:
                row = to_ours(theirs, self.format, self.columns)
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
            if problem := check_row(row, self.format):
                raise DataError(
                    f"{place}: {problem} (manifest {self.name}, format {self.format}): correct it."
                )
            family = family_of(row)
            found.add(family)
            if not self._families or family in self._families:
                yield place, row
        for family in self._families:
            if family not in found:
                raise DataError(
                    f"{self.name} has no row of family '{family}' in split {split}: "
                    f"{nearest(family, sorted(found - {''}))}."
                )

    def files(self, split: str) -> list[tuple[Path, str, int]]:
        """Local files of a split with their expected sha256 and bytes; made or fetched where they can be.

        Raises:
            DataError: not pinned, not on this machine and not reachable, or a generator that gives something
            else.
        """
        source = self.source(split)
        if isinstance(source, HubSource):
            from lab_utils.data import hub

            return hub.local_files(self.name, source)
        if isinstance(source, GeneratedSource):
            return [(sources.generated_file(self.name, source), source.sha256, source.bytes)]
        return [(self._folder / entry.path, entry.sha256, entry.bytes) for entry in source.files]

    def fingerprint(self, split: str) -> str:
        """All that the rows of a split depend on: hashes of content, format, columns; no paths, no names."""
        source = self.source(split)
        if isinstance(source, GeneratedSource):
            hashes = [source.sha256]
        else:
            hashes = [entry.sha256 for entry in source.files]
        share = source.share.model_dump() if isinstance(source, FileSource) and source.share else None
        only = (sorted(self._families),) if self._families else ()
        return repr((hashes, share, self.format, sorted(self.columns.items()), *only))

    @property
    def _folder(self) -> Path:
        return self.path.parent if self.path else Path.cwd()

    def _raw_rows(self, split: str) -> Iterator[tuple[str, Row]]:
        source = self.source(split)
        files = self.files(split)
        for path, sha256, size in files:
            sources.check_file(path, sha256, size, self.name)
        if isinstance(source, HubSource):
            from lab_utils.data import hub

            yield from hub.rows(self.name, source, [path for path, _, _ in files])
            return
        share = source.share if isinstance(source, FileSource) else None
        expected = [e.rows for e in source.files] if isinstance(source, FileSource) else [source.rows]
        kept = 0
        for (path, _, _), rows in zip(files, expected):
            count = 0
            for place, row in sources.read_rows(path):
                count += 1
                if share is None or share.start <= sources.uniform(row, share.seed) < share.stop:
                    kept += 1
                    yield place, row
            if count != rows:
                raise DataError(
                    f"{path}: expected {rows} rows, found {count}: correct the manifest {self.name} or the "
                    "file."
                )
        if share and kept != share.rows:
            raise DataError(
                f"{self.name}: expected {share.rows} rows in split {split}, found {kept}: "
                "add the file again with lab data add."
            )

    def verify(self) -> list[Problem]:
        """Check everything: presence, sha256, bytes, number of rows, and the form of every row."""
        problems = []
        for split in self.splits:
            try:
                for path, sha256, size in self.files(split):
                    sources.check_file(path, sha256, size, self.name, remembered=False)
                for _ in self.rows(split):
                    pass
            except DataError as error:
                problems.append(Problem(self.name, split, str(error)))
        return problems

    def unpinned(self) -> list[str]:
        """Splits of hub sources without revision and hashes."""
        return [s for s, source in self.splits.items() if isinstance(source, HubSource) and not source.pinned]

    def row_count(self, split: str) -> int | None:
        """Rows as the manifest states them, whatever the families; None for a hub set."""
        source = self.source(split)
        if isinstance(source, HubSource):
            return None
        if isinstance(source, GeneratedSource):
            return source.rows
        return source.share.rows if source.share else sum(entry.rows for entry in source.files)

    # -- writing ---------------------------------------------------------------------------------------------

    def to_yaml(self) -> str:
        tree = self.model_dump(mode="json")
        for source in tree["splits"].values():
            if source.get("share", 0) is None:
                del source["share"]
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)

    def save(self, path: Path) -> Path:
        """Write the YAML whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(self.to_yaml())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        return path


def of_source(source: DataSource) -> Manifest:
    """The data that a recipe's source names: its manifest, of its families.

    Raises:
        DataError: see ``load_manifest``.
    """
    return load_manifest(source.manifest).only(source.families)


# -- finding -------------------------------------------------------------------------------------------------


def folders() -> list[Path]:
    """Where manifests are looked for: the folders in ASCENT_MANIFESTS, then the shipped one."""
    extra = [Path(p) for p in os.environ.get("ASCENT_MANIFESTS", "").split(os.pathsep) if p]
    return [*extra, SHIPPED]


def list_manifests() -> list[Manifest]:
    """Every manifest that can be named, sorted; the first folder wins where a name occurs twice."""
    found: dict[str, Manifest] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, load_manifest(path))
    return [found[name] for name in sorted(found)]


def load_manifest(name_or_path: str | Path) -> Manifest:
    """The manifest of a name, or of a YAML file.

    Raises:
        DataError: no such manifest, not YAML, or not of the schema (the key is named).
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = {p.stem: p for folder in reversed(folders()) for p in folder.glob("*.yaml")}
        if str(name_or_path) not in known:
            hint = nearest(str(name_or_path), list(known)) if known else "there are none"
            raise DataError(
                f"There is no manifest '{name_or_path}': {hint} (lab data list), or give a .yaml file."
            )
        path = known[str(name_or_path)]
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such manifest; see lab data list.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark else ""
        raise DataError(f"{path}: not valid YAML{at}; correct the file.") from None
    if not isinstance(tree, dict):
        raise DataError(
            f"{path}: expected a mapping (name, version, format, splits, …); see data_manifests/."
        )
    try:
        return Manifest.model_validate({**tree, "path": path.resolve()})
    except ValidationError as error:
        first, more = error.errors()[0], error.error_count() - 1
        key = ".".join(str(part) for part in first["loc"])
        text = f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}"
        raise DataError(
            f"{path}: {text}{f' ({more} more like it)' if more else ''}; correct the manifest."
        ) from None
