"""What is evaluated on: rows of verified manifests, limited evenly over the task families.

``NAME[:SPLIT]``, several with commas. Questions come from format ``prompt``, perplexity from ``messages`` and ``text``,
pairs from ``preference``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab_utils.data.columns import family_of
from lab_utils.data.manifest import Manifest, load_manifest
from lab_utils.data.tasks import families
from lab_utils.errors import DataError
from lab_utils.registry import nearest

Row = dict[str, Any]
SPLITS = ("test", "validation")  # what is taken where none is named: the first that a manifest has


@dataclass(frozen=True)
class HeldOut:
    """Rows of one split.

    Attributes:
        name, split, format: of the manifest.
        rows: in its order; with a limit, spread over the families.
        families: of each row: ``verify.family``, else its column ``family``, else the manifest's name.
    """

    name: str
    split: str
    format: str
    rows: list[Row]
    families: list[str]

    @property
    def label(self) -> str:
        return f"{self.name}:{self.split}"

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "split": self.split, "format": self.format, "rows": len(self.rows)}


def split_specs(on: str | Sequence[str]) -> list[str]:
    """``"a,b:test"`` or a list of such, as single names.

    Raises:
        DataError: none is left.
    """
    parts = [on] if isinstance(on, str) else list(on)
    specs = [name.strip() for part in parts for name in str(part).split(",") if name.strip()]
    if not specs:
        raise DataError("--on names no manifest: give one or more, as ascent-tasks-prompts (lab data list).")
    return specs


def find_split(spec: str, split: str | None = None) -> tuple[Manifest, str]:
    """The manifest of ``NAME[:SPLIT]`` and its split.

    Args:
        spec: a name or a path.
        split: used where ``spec`` names none; absent: test, or validation where there is no test.

    Raises:
        DataError: no such manifest or split, or one without a held-out split.
    """
    name, colon, named = spec.rpartition(":")
    if not colon or Path(spec).exists():
        name, named = spec, ""
    manifest = load_manifest(name)
    wanted = named or split or next((s for s in SPLITS if s in manifest.splits), None)
    if wanted is None:
        raise DataError(
            f"{manifest.name} has neither a test nor a validation split (it has {', '.join(manifest.splits)}): "
            f"name one, as {manifest.name}:{next(iter(manifest.splits))}."
        )
    manifest.source(wanted)
    return manifest, wanted


def load_held_out(spec: str, split: str | None = None, limit: int | None = None) -> HeldOut:
    """Checked rows of ``NAME[:SPLIT]``, at most ``limit`` of them.

    Raises:
        DataError: as ``find_split``; data that is not what the manifest says; a question that no verifier knows.
    """
    manifest, chosen = find_split(spec, split)
    rows = spread(manifest.rows(chosen), manifest.name, limit)
    known = set(families())
    for row in rows if manifest.format == "prompt" else ():
        wanted = (row.get("verify") or {}).get("family")
        if wanted is not None and wanted not in known:
            raise DataError(
                f"{manifest.name}:{chosen}: a question's verify.family is '{wanted}': {nearest(wanted, sorted(known))}."
            )
    return HeldOut(
        manifest.name, chosen, manifest.format, rows, [family_of(row) or manifest.name for row in rows]
    )


def load_questions(spec: str, split: str | None = None, limit: int | None = None) -> list[Row]:
    """Rows of a prompt manifest.

    Raises:
        DataError: as ``load_held_out``, or the manifest is of another format.
    """
    manifest, _ = find_split(spec, split)
    if manifest.format != "prompt":
        raise DataError(
            f"{manifest.name} has format {manifest.format}, but questions need format prompt: see lab data list."
        )
    return load_held_out(spec, split, limit).rows


def spread(rows: Iterable[Row], name: str, limit: int | None) -> list[Row]:
    """At most ``limit`` rows, as many of each family as there are, the families in turn."""
    rows = list(rows)
    if limit is None or limit >= len(rows):
        return rows
    by_family: dict[str, list[Row]] = {}
    for row in rows:
        by_family.setdefault(family_of(row) or name, []).append(row)
    chosen: list[Row] = []
    depth = 0
    while len(chosen) < limit:
        chosen += [family[depth] for family in by_family.values() if depth < len(family)]
        depth += 1
    return chosen[:limit]
