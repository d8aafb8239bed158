"""What an offline W&B run holds, read by W&B's own tool and held against metrics.jsonl.

``wandb leet inspect --json`` prints the records of a transaction log, of a running or killed writer too, in about two
seconds and without a server. Our own record, metrics.jsonl, is what W&B is compared with and not the other way round.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab_utils.errors import RunError
from lab_utils.telemetry import jsonl
from lab_utils.telemetry.wandb import NOWHERE, run_id

STEP = "train/global_step"


@dataclass(frozen=True)
class Piece:
    """One offline directory: a W&B run from a start to an end; a resumed run has several of one id."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name.rpartition("-")[2]

    @property
    def log(self) -> Path:
        """The transaction log; it may not be there in the first moment."""
        return self.path / f"run-{self.id}.wandb"

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.log.stat().st_size if self.log.exists() else 0


def pieces(run_dir: Path | str) -> dict[str, list[Piece]]:
    """The offline pieces of a run by W&B's id, one a node; each in the order of start, with which names begin."""
    found: dict[str, list[Piece]] = {}
    for path in sorted((Path(run_dir) / "wandb").glob("offline-run-*")):
        found.setdefault(Piece(path).id, []).append(Piece(path))
    return found


def command(*arguments: str) -> list[str]:
    """The wandb of this environment."""
    return [sys.executable, "-m", "wandb", *arguments]


def records(piece: Piece) -> Iterator[dict[str, Any]]:
    """Every record of a piece, as W&B's tool prints it.

    Raises:
        RunError: the tool cannot read it.
    """
    scratch = piece.path.parent / "config"
    quiet = {"WANDB_ERROR_REPORTING": "false", "WANDB_BASE_URL": NOWHERE, "WANDB_CONFIG_DIR": str(scratch)}
    done = subprocess.run(
        command("leet", "inspect", "--json", str(piece.log)),
        capture_output=True,
        text=True,
        env={**os.environ, **quiet, "WANDB_DIR": str(piece.path.parent), "WANDB_MODE": "offline"},
        cwd=piece.path,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(
            f"W&B's own tool cannot read {piece.log} ({reason}): metrics.jsonl has the same numbers."
        )
    yield from (row for line in done.stdout.splitlines() if (row := jsonl.parse(line)) is not None)


def history(run_dir: Path | str, node: int = 0) -> list[dict[str, float]]:
    """The logged lines of a node, over all pieces: ``step`` and the metrics, W&B's own keys left out.

    Raises:
        RunError: the node has no offline piece, or one cannot be read.
    """
    chains = pieces(run_dir)
    name = Path(run_dir).resolve().name
    chain = chains.get(run_id(f"{name}/node-{node}"))
    if chain is None and len(chains) == 1:
        (chain,) = chains.values()  # the folder has another name now
    if not chain:
        raise RunError(
            f"{name} has no offline W&B run of node {node} (wandb/offline-run-*): tracking.wandb says why."
        )
    lines = []
    for piece in chain:
        for record in records(piece):
            item = (record.get("history") or {}).get("item") or {}
            values = {k: float(v) for k, v in item.items() if not k.startswith(("_", "samples"))}
            if len(values) > 1:  # a table stands alone with its step
                lines.append({"step": int(values[STEP]), **values})
    return lines


def compare(run_dir: Path | str) -> dict[str, Any]:
    """Every metric of metrics.jsonl against W&B's offline record.

    Returns:
        ``lines`` and ``values`` compared, ``missing``: lines at the end that W&B lost with its process (a second's
        worth), ``differences``: [{step, key, metrics_jsonl, wandb}], ``equal``.

    Raises:
        RunError: there is no offline W&B run, or it cannot be read.
    """
    run_dir = Path(run_dir)
    ours = list(jsonl.read(run_dir / "metrics.jsonl"))
    theirs = history(run_dir)
    differences: list[dict[str, Any]] = []
    compared, at, missing = 0, 0, 0
    for row in ours:
        if at < len(theirs) and theirs[at]["step"] == row["step"] and _keys(theirs[at]) >= _keys(row):
            line, at = theirs[at], at + 1
        else:
            missing += 1
            continue
        for key in sorted(_keys(line) | _keys(row)):
            compared += 1
            a, b = (float(found[key]) if key in found else None for found in (row, line))
            if a != b and not (a is not None and b is not None and math.isnan(a) and math.isnan(b)):
                differences.append({"step": row["step"], "key": key, "metrics_jsonl": a, "wandb": b})
    differences += [
        {"step": r["step"], "key": "", "metrics_jsonl": None, "wandb": "line"} for r in theirs[at:]
    ]
    return {
        "run": run_dir.name,
        "lines": at,
        "values": compared,
        "missing": missing,
        "differences": differences,
        "equal": not differences,
    }


def _keys(row: dict[str, Any]) -> set[str]:
    return {key for key in row if key not in ("step", "time")}
