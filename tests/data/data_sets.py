"""Small sets on disk with their manifests, for the tests of this folder."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import yaml


def write_jsonl(path: Path, rows: list) -> Path:
    data = "".join(
        (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
    )
    path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())
    return path


def entry(path: Path, rows: int) -> dict:
    data = path.read_bytes()
    return {
        "path": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "rows": rows,
    }


def write_manifest(folder: Path, format: str, splits: dict, name: str = "trial", **more) -> Path:
    tree = {"name": name, "version": "1", "licence": "CC0-1.0", "provenance": "made for a test"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**tree, "format": format, "splits": splits, **more}, sort_keys=False))
    return path


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
