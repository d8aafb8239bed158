"""What a run learned from: every source with split, version, licence and hashes."""

from __future__ import annotations

from typing import Any

from lab_utils.errors import LabError
from lab_utils.recipe import Recipe


def data(
    recipe: Recipe, provenance: dict[str, Any], facts: dict[str, Any], epochs: float | None
) -> dict[str, Any]:
    """Every source with split, version, licence and hashes; rows and tokens as the ranks counted them."""
    counted = facts.get("data") if isinstance(facts.get("data"), dict) else {}
    told = provenance.get("data") if isinstance(provenance.get("data"), dict) else {}
    sources = []
    for role in ("train", "validation"):
        given = getattr(recipe.data, role)
        counts = counted.get(role) or []
        for index, source in enumerate(given):
            census = counts[index] if len(counts) == len(given) else {}
            sources.append(
                _source(role, source, _manifest(source.manifest, told.get(source.manifest)), census)
            )
    return {
        "sources": sources,
        "epochs": epochs,
        "row_tokens": recipe.data.row_tokens,
        "mode": recipe.data.mode,
        "drop_thinking": recipe.data.drop_thinking,
        "held_out_questions": counted.get("questions"),
    }


def _manifest(name: str, told: Any) -> dict[str, Any]:
    """What provenance has of a set; of a run from before it had licences, the manifest of today if its hashes agree."""
    told = told if isinstance(told, dict) else {}
    if told.get("splits"):
        return told
    from lab_utils.data.manifest import load_manifest
    from lab_utils.runs.provenance import collect_hashes

    try:
        tree = load_manifest(name).model_dump(mode="json")
    except LabError:
        return told
    hashes: dict[str, str] = {}
    collect_hashes(tree, "", hashes)
    return tree if hashes == told.get("sha256") else told


def _source(role: str, source: Any, manifest: dict[str, Any], census: dict[str, Any]) -> dict[str, Any]:
    split = (manifest.get("splits") or {}).get(source.split) or {}
    files = [
        {
            "path": file.get("path"),
            "sha256": file.get("sha256"),
            "bytes": file.get("bytes"),
            "rows": file.get("rows"),
        }
        for file in split.get("files") or ()
    ]
    made = {key: split.get(key) for key in ("generator", "seed", "arguments") if split.get(key) is not None}
    if not files and split.get("sha256"):
        files = [
            {
                "path": f"{split.get('generator')}, seed {split.get('seed')}",
                "sha256": split["sha256"],
                "bytes": split.get("bytes"),
                "rows": split.get("rows"),
            }
        ]
    if not files:  # hashes without the split that they belong to
        files = [{"path": path, "sha256": digest} for path, digest in (manifest.get("sha256") or {}).items()]
    rows = [file.get("rows") for file in files]
    shared = split.get("share") or {}
    return {
        "role": role,
        "manifest": source.manifest,
        "split": source.split,
        "families": list(source.families),
        "weight": source.weight,
        "version": manifest.get("version"),
        "licence": manifest.get("licence"),
        "provenance": manifest.get("provenance"),
        "format": manifest.get("format"),
        "hub": {key: split[key] for key in ("id", "config", "revision") if split.get(key)} or None,
        "generated": made or None,
        "files": files,
        "rows": shared.get("rows") or (sum(rows) if rows and all(isinstance(n, int) for n in rows) else None),
        "units": census.get("units"),
        "tokens_per_pass": census.get("tokens"),
    }
