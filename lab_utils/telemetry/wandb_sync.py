"""Offline W&B runs brought to a server, when somebody asks for it and names the server.

``wandb sync`` does the uploading, in processes of its own. Around it: many runs and nodes side by side; the pieces of a
resumed run one after the other, in order of start; a record of what is up (``<run>/wandb/synced.json``), so that the
next call goes on where this one was interrupted; another try where the network failed; and, of a run that still goes
on, ``wandb beta sync --live``, which reads along.

A piece that has grown since it was sent is sent again, its lines numbered as before (W&B's ``.syncstate``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab_utils.telemetry.wandb_reader import Piece, command, pieces
from lab_utils.telemetry.wandb_server import Record

TRIES = 3
PAUSE = 5.0  # seconds before the next try, and twice that before the third
POLL = 1.0
# A writer that was killed leaves its log open for ever: after so much silence of an ended run nobody follows it.
QUIET = 30.0


@dataclass(frozen=True)
class Job:
    """One run to bring up.

    Attributes:
        path: the run directory.
        url: the server.
        active: whether the run still goes on; asked again and again while it is followed.
    """

    path: Path
    url: str
    active: Callable[[], bool] = lambda: False


def environment(run_dir: Path, url: str) -> dict[str, str]:
    """Of the uploading process: the server, and its own logs inside the run."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("WANDB_MODE", "WANDB_CONFIG_DIR", "WANDB_SILENT")
    }
    return kept | {
        "WANDB_BASE_URL": url,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DIR": str(run_dir / "wandb"),
        "WANDB_DATA_DIR": str(run_dir / "wandb" / "data"),
        "WANDB_CACHE_DIR": str(run_dir / "wandb" / "cache"),
    }


def outdated(run_dir: Path) -> bool:
    """Whether scores or samples are newer than the newest piece, as after ``lab eval``."""
    logs = [piece.log for chain in pieces(run_dir).values() for piece in chain if piece.log.exists()]
    results = [p for name in ("report.json", "samples.jsonl") if (p := run_dir / name).exists()]
    if not logs or not results:
        return False
    return max(p.stat().st_mtime for p in results) > max(p.stat().st_mtime for p in logs)


def plan(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """What a call would do, a row a piece: run, piece, bytes, state ``done``, ``running`` or ``to upload``."""
    rows = []
    for job in jobs:
        record, active = Record(job.path, job.url), job.active()
        for chain in pieces(job.path).values():
            for piece in chain:
                open_ended = active and piece is chain[-1]
                state = "done" if record.has(piece) else "running" if open_ended else "to upload"
                rows.append(
                    {"run": job.path.name, "piece": piece.path.name, "bytes": piece.size, "state": state}
                )
        if not active and outdated(job.path):
            rows.append({"run": job.path.name, "piece": "report.json", "bytes": 0, "state": "to upload"})
    return rows


def sync(
    jobs: Sequence[Job],
    *,
    parallel: int = 4,
    live: bool = False,
    say: Callable[[str], None] = lambda text: None,
    pause: float = PAUSE,
) -> list[dict[str, Any]]:
    """Bring runs up, ``parallel`` uploads at a time; returns a row a piece as ``plan`` does.

    States: ``uploaded``, ``done`` before, ``running`` (left to a later call or to ``live``), ``failed`` with ``error``.

    Args:
        live: follow runs that still go on, to their end; each is followed at once, whatever ``parallel`` is.
    """

    slots = threading.Semaphore(parallel)

    def one(job: Job) -> list[dict[str, Any]]:
        return _Upload(job, slots, say, pause).run(live)

    workers = max(parallel, sum(job.active() for job in jobs) if live else 0, 1)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return [row for rows in pool.map(one, jobs) for row in rows]


class _Upload:
    """One run on its way."""

    def __init__(self, job: Job, slots: threading.Semaphore, say: Callable[[str], None], pause: float):
        self.job, self.slots, self.say, self.pause = job, slots, say, pause
        self.record = Record(job.path, job.url)
        self.environment = environment(job.path, job.url)
        self.rows: dict[str, dict[str, Any]] = {}

    def run(self, live: bool) -> list[dict[str, Any]]:
        if live:
            self._follow()
        active = self.job.active()
        if not active and outdated(self.job.path):
            self._amend()
        chains = list(pieces(self.job.path).values())
        self._chains([chain[:-1] if active else chain for chain in chains])
        if active:
            for chain in chains:
                self._tell(chain[-1], "running")
        names = [piece.path.name for chain in chains for piece in chain] + ["report.json"]
        return [self.rows[name] for name in names if name in self.rows]

    def _chains(self, chains: Sequence[Sequence[Piece]]) -> None:
        """Nodes side by side."""
        if chains:
            with ThreadPoolExecutor(max_workers=len(chains)) as pool:
                list(pool.map(self._chain, chains))

    def _amend(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "lab_utils.telemetry.wandb", str(self.job.path)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            row = {"run": self.job.path.name, "piece": "report.json", "bytes": 0, "state": "failed"}
            self.rows["report.json"] = {**row, "error": f"could not be added: {reason}"}

    def _chain(self, chain: Sequence[Piece]) -> None:
        """Pieces in their order; one that fails keeps back those after it."""
        for index, piece in enumerate(chain):
            if self.record.has(piece):
                self._tell(piece, "done")
            elif error := self._send(piece):
                self._tell(piece, "failed", error)
                for later in chain[index + 1 :]:
                    self._tell(later, "failed", f"waits for {piece.path.name}")
                return

    def _send(self, piece: Piece) -> str | None:
        """One piece; returns why it failed."""
        error = None
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self.pause * attempt)
            size = piece.size
            _marker(piece).unlink(missing_ok=True)
            with self.slots:
                done = subprocess.run(
                    command("sync", "--yes", "--include-synced", str(piece.path)),
                    capture_output=True,
                    text=True,
                    stdin=subprocess.DEVNULL,
                    env=self.environment,
                    cwd=self.job.path,
                )
            if done.returncode == 0 and _marker(piece).exists():
                self.record.add(piece, size)
                self._tell(piece, "uploaded")
                return None
            error = _reason(done.stdout + done.stderr)
        return error

    def _follow(self) -> None:
        """Read along while the run goes on; a piece that its writer has closed is complete."""
        failures = 0
        while self.job.active() and failures < TRIES:
            chains = pieces(self.job.path)
            self._chains([chain[:-1] for chain in chains.values()])
            newest = [chain[-1] for chain in chains.values() if not self.record.has(chain[-1])]
            if newest:
                failures = 0 if self._read_along(newest) else failures + 1
            time.sleep(self.pause * failures if failures else POLL)

    def _read_along(self, newest: Sequence[Piece]) -> bool:
        """One ``--live`` process for the newest pieces of all nodes, until they are complete or others have begun."""
        for piece in newest:
            _marker(piece).unlink(missing_ok=True)
        paths = [str(piece.path) for piece in newest]
        self.say(f"{self.job.path.name}: following {len(newest)} W&B run(s)")
        log = self.job.path / "wandb" / "sync-live.log"
        with log.open("ab") as output:
            child = subprocess.Popen(
                command("beta", "sync", "--live", "--yes", "--no-skip-synced", "-n", str(len(paths)), *paths),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.job.path,
            )
        try:
            while child.poll() is None:
                time.sleep(POLL)
                ids = {chain[-1].path for chain in pieces(self.job.path).values()}
                silent = time.time() - max(piece.log.stat().st_mtime for piece in newest) > QUIET
                if not {piece.path for piece in newest} <= ids or (silent and not self.job.active()):
                    break
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
        complete = [piece for piece in newest if _marker(piece).exists()]
        for piece in complete:
            self.record.add(piece, piece.size)
            self._tell(piece, "uploaded")
        return len(complete) == len(newest) or child.returncode in (0, -15)

    def _tell(self, piece: Piece, state: str, error: str | None = None) -> None:
        if state == "done" and piece.path.name in self.rows:
            return  # by this call, a moment ago
        row = {"run": self.job.path.name, "piece": piece.path.name, "bytes": piece.size, "state": state}
        self.rows[piece.path.name] = row | ({"error": error} if error else {})
        if state in ("uploaded", "failed"):
            self.say(f"{row['run']}: {piece.path.name} {state}" + (f" ({error})" if error else ""))


def _marker(piece: Piece) -> Path:
    """W&B's own word that a piece is up."""
    return piece.log.with_name(piece.log.name + ".synced")


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or "denied" in line or "uthenticat" in line]
    return (telling or lines or ["wandb sync said nothing"])[-1][:300]
