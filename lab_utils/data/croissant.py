"""A manifest as Croissant 1.0 (JSON-LD), the format in which catalogues describe data sets."""

from __future__ import annotations

from typing import Any

from lab_utils.data.manifest import FileSource, GeneratedSource, HubSource, Manifest

SPECIFICATION = "http://mlcommons.org/croissant/1.0"
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "repeated": "cr:repeated",
    "sha256": "cr:sha256",
    "source": "cr:source",
    "subField": "cr:subField",
}
TYPES = {
    ".parquet": "application/x-parquet",
    ".gz": "application/gzip",
    ".jsonl": "application/jsonlines",
    ".json": "application/json",
    ".csv": "text/csv",
}
# Columns that hold a list of objects; the others are text.
LISTS = ("messages", "conversations", "chosen", "rejected", "tools")
MESSAGE = ("role", "content")


def to_croissant(manifest: Manifest) -> dict[str, Any]:
    """The JSON-LD tree: a FileObject for each file, a RecordSet for each split and file."""
    from lab_utils.data.columns import COLUMNS

    columns = manifest.columns or {c: c for c in _own(manifest.format, COLUMNS)}
    files: dict[str, dict[str, Any]] = {}
    records = []
    for split, source in manifest.splits.items():
        ids = []
        for path, url, sha256, size in _files(manifest, source):
            files[path] = {
                "@type": "cr:FileObject",
                "@id": path,
                "name": path,
                "contentUrl": url,
                "contentSize": f"{size} B",
                "encodingFormat": next(
                    (t for e, t in TYPES.items() if path.endswith(e)), "application/octet-stream"
                ),
                "sha256": sha256,
            }
            ids.append(path)
        records += [
            {
                "@type": "cr:RecordSet",
                "@id": f"{split}/{number}" if number else split,
                "name": f"{split}-{number}" if number else split,
                "field": [_field(split, number, theirs, path) for theirs in columns.values()],
            }
            for number, path in enumerate(ids)
        ]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": SPECIFICATION,
        "name": manifest.name,
        "description": manifest.provenance,
        "license": manifest.licence,
        "version": manifest.version,
        "distribution": list(files.values()),
        "recordSet": records,
    }


def _own(format: str, known: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Columns of a set in our own names."""
    return (
        ("messages",) if format in ("messages", "prompt") else tuple(c for c in known[format] if c != "tools")
    )


def _files(
    manifest: Manifest, source: FileSource | HubSource | GeneratedSource
) -> list[tuple[str, str, str, int]]:
    """Name, URL, sha256 and bytes of each file of a split."""
    if isinstance(source, HubSource):
        from huggingface_hub import constants

        base = f"{constants.ENDPOINT}/datasets/{source.id}/resolve/{source.revision}"
        return [(file.path, f"{base}/{file.path}", file.sha256, file.bytes) for file in source.files]
    if isinstance(source, GeneratedSource):
        name = f"{source.generator}-{source.sha256[:20]}.jsonl"
        return [(name, name, source.sha256, source.bytes)]
    return [(file.path, file.path, file.sha256, file.bytes) for file in source.files]


def _field(split: str, number: int, column: str, file: str) -> dict[str, Any]:
    prefix = f"{split}/{number}" if number else split
    by = "column" if file.endswith((".parquet", ".csv")) else "jsonPath"
    place = {"fileObject": {"@id": file}, "extract": {by: column if by == "column" else f"$.{column}"}}
    field = {
        "@type": "cr:Field",
        "@id": f"{prefix}/{column}",
        "name": column,
        "dataType": "sc:Text",
        "source": place,
    }
    if column in LISTS:
        field["repeated"] = True
        if column != "tools":
            parts = ("from", "value") if column == "conversations" else MESSAGE
            field["subField"] = [
                {
                    "@type": "cr:Field",
                    "@id": f"{prefix}/{column}/{part}",
                    "name": part,
                    "dataType": "sc:Text",
                    "source": {
                        "fileObject": {"@id": file},
                        "extract": {by: f"{column}.{part}" if by == "column" else f"$.{column}[*].{part}"},
                    },
                }
                for part in parts
            ]
            del field["dataType"], field["source"]
    return field
