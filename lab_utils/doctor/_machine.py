"""What a check is given, and what it answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

COMMAND_SECONDS = 30.0
IMPORT_SECONDS = 180.0  # torch from a cold network file system


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        check: what was looked at.
        ok: True: passed. False: failed, and ``advice`` says what to do. None: doesn't apply here, or wasn't looked at.
        found: what is there.
        advice: what to do; empty for most that passed.
    """

    check: str
    ok: bool | None
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Machine:
    """The machine as checks see it; tests give another ``system`` and ``environ``.

    Attributes:
        runs: folder of runs, which need not exist.
        peers: other nodes to reach.
        quick: leave out what takes seconds.
        system: root of the file tree in which devices, drivers and mounts are looked for.
        environ: environment variables; commands are looked for in its PATH.
    """

    runs: Path
    peers: tuple[str, ...] = ()
    quick: bool = False
    system: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @classmethod
    def here(
        cls, *, runs: str | Path | None = None, peers: Sequence[str] = (), quick: bool = False
    ) -> Machine:
        from lab_utils.runs.directory import default_root

        return cls(Path(runs) if runs is not None else default_root(), tuple(peers), quick)

    @property
    def folder(self) -> Path:
        """The folder of runs, or the nearest above it that exists: where files can be tried."""
        from lab_utils.runs.checks import existing

        return existing(self.runs)

    @property
    def has_npus(self) -> bool:
        """A compute node of Ascend: the driver's devices are there, or its tool."""
        devices = any(path.name[7:].isdigit() for path in (self.system / "dev").glob("davinci*"))
        return devices or self.which("npu-smi") is not None

    @property
    def has_gpus(self) -> bool:
        return (self.system / "dev" / "nvidiactl").exists()

    @property
    def has_slurm(self) -> bool:
        """Slurm's client is here and knows a cluster; the tools alone may be there for no reason."""
        places = [self.system / "etc/slurm/slurm.conf", self.system / "run/slurm/conf/slurm.conf"]
        own = self.environ.get("SLURM_CONF")
        known = any(place.exists() for place in [*places, *([Path(own)] if own else [])])
        return known and self.which("sinfo") is not None

    def which(self, command: str) -> str | None:
        return shutil.which(command, path=self.environ.get("PATH", ""))

    def ask(self, *words: str, seconds: float = COMMAND_SECONDS) -> str | None:
        """Output of a command; None where it is missing, fails or takes too long."""
        found = self.which(words[0])
        if found is None:
            return None
        try:
            done = subprocess.run(
                [found, *words[1:]],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                env=dict(self.environ),
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout if done.returncode == 0 else None

    def python(
        self, code: str, *, seconds: float = IMPORT_SECONDS, **environ: str
    ) -> tuple[int | None, str, str]:
        """``code`` in a fresh interpreter: exit code (None: out of time), standard output, standard error."""
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                env={**self.environ, **environ},
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return None, "", f"no answer in {seconds:.0f} s"
        return done.returncode, done.stdout.strip(), done.stderr.strip()


def last_line(text: str) -> str:
    """What a traceback says in the end."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
