"""Where a run came from: code, data, packages, machine, notebook. Written before anything starts."""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lab_utils.recipe import Recipe
from lab_utils.runs import site
from lab_utils.runs.directory import write_atomic

SOURCE = Path(__file__).resolve().parents[2]
MAX_DIFF = 1_000_000  # characters of a dirty tree's diff that are kept


def git(folder: Path = SOURCE) -> dict[str, Any]:
    """Commit, branch and uncommitted changes of the code at ``folder``; {} where it is no clone."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=20,
                check=True,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout

    commit = ask("rev-parse", "HEAD") if shutil.which("git") else None
    if not commit:
        return {}
    # As git itself would apply it: notebooks have drivers of their own for a person's eyes.
    diff = ask("diff", "--no-ext-diff", "--no-textconv", "HEAD") or ""
    changed = ask("status", "--porcelain", "--untracked-files=all") or ""
    return {
        "commit": commit.strip(),
        "branch": (ask("rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "dirty": bool(changed.strip()),
        "untracked": [line[3:] for line in changed.splitlines() if line.startswith("??")][:200],
        "diff": diff[:MAX_DIFF],
        "diff_cut": len(diff) > MAX_DIFF,
    }


def packages() -> dict[str, str]:
    """Every installed distribution and its version."""
    return dict(
        sorted(
            (d.metadata["Name"], d.version) for d in importlib.metadata.distributions() if d.metadata["Name"]
        )
    )


def data_hashes(recipe: Recipe) -> dict[str, Any]:
    """Version, licence and origin of every manifest that the recipe names, and the sha256 of its files; of the splits
    that are used, all that the manifest says."""
    from lab_utils.data.manifest import load_manifest

    found: dict[str, Any] = {}
    used: dict[str, set[str]] = {}
    for source in (*recipe.data.train, *recipe.data.validation):
        used.setdefault(source.manifest, set()).add(source.split)
    for name in used:
        tree = load_manifest(name).model_dump(mode="json")
        hashes: dict[str, str] = {}
        collect_hashes(tree, "", hashes)
        told = ("version", "revision", "licence", "provenance", "format")
        found[name] = {key: tree[key] for key in told if tree.get(key)} | {
            "splits": {
                split: tree["splits"][split] for split in sorted(used[name]) if split in tree["splits"]
            },
            "sha256": hashes,
        }
    return found


def collect_hashes(node: Any, where: str, into: dict[str, str]) -> None:
    """Every ``sha256`` in a manifest, by the path of the file it stands beside."""
    if isinstance(node, dict):
        if isinstance(node.get("sha256"), str):
            into[str(node.get("path") or where)] = node["sha256"]
        for key, value in node.items():
            collect_hashes(value, f"{where}.{key}".lstrip("."), into)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            collect_hashes(value, f"{where}.{index}".lstrip("."), into)


def collect(recipe: Recipe) -> dict[str, Any]:
    """Everything that another person needs to know where a run came from, as JSON values."""
    dp, micro_rows, accumulation = recipe.layout()
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "layout": {
            "ranks": recipe.cluster.world_size,
            "dp": dp,
            "micro_rows": micro_rows,
            "accumulation": accumulation,
        },
        "data": data_hashes(recipe),
        "site": site.of_environment(),
        "git": git(),
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "user": _user(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cwd": str(Path.cwd()),
        # Set by `lab notebook` for the copy that it executes.
        "notebook": os.environ.get("ASCENT_NOTEBOOK"),
        "packages": packages(),
        "lock_sha256": _sha256(SOURCE / "requirements.lock"),
    }


def write(path: Path, recipe: Recipe) -> dict[str, Any]:
    """Collect and store in ``path``/provenance.json; a resumed run keeps the first and lists later ones."""
    found = collect(recipe)
    target = path / "provenance.json"
    if target.exists():
        first = json.loads(target.read_text(encoding="utf-8"))
        again = {key: found[key] for key in ("created", "host", "git", "notebook", "packages")}
        # Only what differs is worth a second copy.
        again = {key: value for key, value in again.items() if key == "created" or value != first.get(key)}
        found = {**first, "resumed": [*first.get("resumed", []), again]}
    write_atomic(target, json.dumps(found, indent=1, ensure_ascii=False, default=str))
    return found


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # installed without the source tree
        return None


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user id
        return None
