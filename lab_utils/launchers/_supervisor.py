"""The process that stays with a local job: ``python -m lab_utils.launchers._supervisor RUN_PATH``.

It starts ``launch.sh``, keeps the heartbeat, passes SIGTERM on, insists where a requested stop is not heard,
leaves no rank behind, and writes how the run ended. It holds no device and imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from lab_utils.launchers._base import SCRIPT, log_files
from lab_utils.launchers._failure import diagnose
from lab_utils.runs import card
from lab_utils.runs.directory import RunDirectory
from lab_utils.runs.states import FINAL

POLL = 0.1
BEAT = 5.0
# After "stop without a checkpoint": how long the worker has to hear it before SIGTERM.
STOP_GRACE = 15.0
# After SIGTERM: how long the job has to save before SIGKILL; torchrun itself gives its ranks 30 s.
KILL_GRACE = 60.0


class Supervisor:
    """One attempt at a run.

    Args:
        run_dir: the run.
        command: what starts the ranks, its output going to ``logs/launcher.log``.
    """

    def __init__(self, run_dir: RunDirectory, command: Sequence[str] | None = None):
        self.run_dir = run_dir
        self.command = list(command or ["bash", str(run_dir.path / SCRIPT)])
        self.log = run_dir.logs / "launcher.log"
        self.started = time.time()
        self.told_to_end: float | None = None
        self.stop_seen: float | None = None
        self.ranks: dict[int, psutil.Process] = {}
        self.signalled = False

    def run(self) -> int:
        """Start the job, wait for its end, record it; returns the job's exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            # Only noted here: the main thread may be inside a locked write that a handler would wait for.
            signal.signal(number, self._hear)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # Logs of nodes are appended to by every attempt: what this one writes begins where they end now.
        self.offsets = {path: path.stat().st_size for path in self._outputs()}
        with self.log.open("ab") as log:
            self.job = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.begin()
        beaten = looked = 0.0
        while self.job.poll() is None:
            now = time.monotonic()
            if self.signalled:
                self.told()
            if now - beaten > BEAT:
                beaten = now
                self.beat()
            if now - looked > 1.0:
                looked = now
                self.look_for_ranks()
                self.insist(now)
            time.sleep(POLL)
        self.clear_up()
        code = self.finish(self.job.returncode)
        card.refresh(self.run_dir)  # also of a run whose ranks were killed
        return code

    def _hear(self, number: int, frame: object) -> None:
        self.signalled = True

    def begin(self) -> None:
        """Leave in status.json who to ask for the job."""
        self.run_dir.write_status(pid=self.job.pid, job=f"{socket.gethostname()}:{os.getpid()}")

    def told(self) -> None:
        """A signal was heard, now or earlier."""
        if self.told_to_end is None:
            self.end()

    def beat(self) -> None:
        # A full disk or a file system that is away for a moment must not end the supervisor.
        with contextlib.suppress(OSError):
            self.run_dir.write_status()

    def end(self) -> None:
        """Ask torchrun to end its ranks; they save first."""
        self.told_to_end = time.monotonic()
        with contextlib.suppress(OSError):
            if self.run_dir.status.get("state") not in FINAL:
                self.run_dir.write_status(state="stopping")
        with contextlib.suppress(ProcessLookupError):
            self.job.send_signal(signal.SIGTERM)

    def insist(self, now: float) -> None:
        """Turn a request that nobody hears into SIGTERM, and a SIGTERM into SIGKILL."""
        if self.told_to_end is None and self.run_dir.control.get("action") == "stop":
            self.stop_seen = self.stop_seen or now
            if now - self.stop_seen > STOP_GRACE:
                self.end()
        if self.told_to_end is not None and now - self.told_to_end > KILL_GRACE:
            for process in [psutil.Process(self.job.pid), *self.ranks.values()]:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def look_for_ranks(self) -> None:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.job.pid).children(recursive=True):
                self.ranks.setdefault(process.pid, process)

    def clear_up(self) -> None:
        """Ranks that torchrun left behind (it may have been killed itself) hold devices: they end now."""
        left = [process for process in self.ranks.values() if process.is_running()]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, left = psutil.wait_procs(left, timeout=KILL_GRACE / 2)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def asked_to_end(self) -> bool:
        """Somebody wanted this end."""
        return self.run_dir.control.get("action") is not None or self.told_to_end is not None

    def finish(self, code: int) -> int:
        """Write the final state: the worker's own where it left one, else what the exit code says; returns the code."""
        state = self.run_dir.status.get("state")
        now = time.time()
        changes: dict = {"finished": now, "exit_code": code}
        asked = self.asked_to_end()
        if state == "succeeded" or (state == "stopped" and (asked or code == 0)):
            pass
        elif code == 0 and state != "failed":
            changes |= {"state": "stopped" if asked else "succeeded"}
        elif self.told_to_end is not None and state != "failed":
            changes |= {"state": "stopped"}
        else:
            error, rank = diagnose(self.run_dir, since=self.started, launcher_text=self.output(), code=code)
            changes |= {"state": "failed", "error": error, "failed_rank": rank}
        self.write(changes)
        state = changes.get("state", state)
        print(f"supervisor: {self.run_dir.name} {state}, exit code {code}", flush=True)
        return code

    def _outputs(self) -> list[Path]:
        """Files that hold what the starters of ranks print."""
        found = log_files(self.run_dir.logs)
        return [path for path in found if path.exists() and not path.name.startswith("rank-")]

    def output(self) -> str:
        """What they have printed in this attempt."""
        parts = []
        for path in self._outputs():
            with contextlib.suppress(OSError), path.open("rb") as stream:
                stream.seek(self.offsets.get(path, 0))
                parts.append(stream.read().decode("utf-8", errors="replace"))
        return "\n".join(parts)

    def write(self, changes: dict) -> None:
        """The last word must be heard even where the disk was full a moment ago."""
        for pause in (0.5, 1.0, 2.0, 4.0, None):
            try:
                self.run_dir.write_status(**changes)
                return
            except OSError as error:
                if pause is None:
                    print(f"supervisor: status.json cannot be written: {error}", flush=True)
                else:
                    time.sleep(pause)


if __name__ == "__main__":
    sys.exit(Supervisor(RunDirectory(sys.argv[1])).run())
