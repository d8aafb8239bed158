"""The supervisor of a scheduler's job: ``python -m lab_utils.launchers._scheduled KIND RUN_PATH -- COMMAND …``.

It runs beside rank 0, on the first node. It starts COMMAND (``srun`` under Slurm, the node's own process in a pod),
keeps the heartbeat and writes how the run ended. When the scheduler wants the nodes back, the run saves a checkpoint,
is put back into the queue, and goes on from there when it starts again.

How a scheduler is heard: its signal reaches this process (Slurm's USR1 before the time limit) or the processes of the
nodes (``_node``; SIGTERM at a preemption); whoever hears it leaves ``checkpoint_and_stop`` in ``control.json``, marked
as the scheduler's. Signals to the ranks themselves would not do: torchrun gives its ranks 30 s, and which processes of
a step Slurm signals depends on its configuration.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod

from lab_utils.launchers._supervisor import Supervisor
from lab_utils.runs.directory import RunDirectory
from lab_utils.runs.states import FINAL

# Exit code of a pod that wants to be started again: EX_TEMPFAIL, as the manifest's policy says.
AGAIN = 75
_ENDED = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+))? \*\*\*")


def ended(run_dir: RunDirectory) -> int | None:
    """Exit code of a run that has ended by itself: a controller that starts it again all the same is told so."""
    status = run_dir.status
    if status.get("state") not in FINAL or not status.get("finished"):
        return None
    return int(status.get("exit_code") or (1 if status["state"] == "failed" else 0))


def ask_to_yield(run_dir: RunDirectory) -> None:
    """Ask the ranks, for the scheduler, to save and stop; a request of the user's is left as it is."""
    if run_dir.control["action"] is None:
        run_dir.request("checkpoint_and_stop", by="scheduler")


class Scheduled(Supervisor, ABC):
    """One attempt at a run under a scheduler."""

    restarts = 0  # how often the job was started before

    def run(self) -> int:
        signal.signal(signal.SIGUSR1, self._hear)
        if (code := ended(self.run_dir)) is not None:
            print(f"supervisor: {self.run_dir.name} has ended already", flush=True)
            return code
        control = self.run_dir.control
        if control["action"] and control.get("by") == "scheduler":
            self.run_dir.request(None)  # it was the attempt before this one that had to yield
        elif control["action"]:
            self.note("stopped", "asked to stop before it had started")
            self.write({"state": "stopped", "finished": time.time()})
            return 0
        return super().run()

    def begin(self) -> None:
        self.run_dir.write_status(pid=None, restarts=self.restarts)

    def told(self) -> None:
        self.signalled = False
        ask_to_yield(self.run_dir)

    def by_scheduler(self) -> bool:
        control = self.run_dir.control
        return control["action"] is not None and control.get("by") == "scheduler"

    def asked_to_end(self) -> bool:
        return self.told_to_end is not None or (super().asked_to_end() and not self.by_scheduler())

    def finish(self, code: int) -> int:
        # A node that failed has the others told to end as a scheduler does: then the code is not 0, and it has failed.
        if code == 0 and self.by_scheduler() and self.run_dir.status.get("state") == "stopped":
            return self.yielded(code)
        return super().finish(code)

    @abstractmethod
    def yielded(self, code: int) -> int:
        """The run has saved and stopped because the scheduler asked it to."""

    def note(self, kind: str, message: str) -> None:
        print(f"supervisor: {message}", flush=True)
        with contextlib.suppress(OSError):
            self.run_dir.append("events.jsonl", {"time": time.time(), "kind": kind, "message": message})


class SlurmJob(Scheduled):
    """Under Slurm, in the batch script on the first node."""

    def __init__(self, run_dir: RunDirectory, command: list[str], requeue: bool = True):
        super().__init__(run_dir, command)
        self.id = os.environ["SLURM_JOB_ID"]
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.requeue = requeue
        self.terminated = self.ending = self.queued = False

    def _hear(self, number: int, frame: object) -> None:
        self.signalled = True
        self.terminated |= number == signal.SIGTERM

    def told(self) -> None:
        super().told()
        if self.terminated and not self.ending:
            self.terminated = False
            self._look()

    def _look(self) -> None:
        """SIGTERM reaches the batch script when Slurm is ending the job, which then has seconds left; why?"""
        text = ""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            words = ["scontrol", "show", "job", "-o", self.id]
            text = subprocess.run(words, capture_output=True, text=True, timeout=5).stdout
        fields = dict(re.findall(r"\b(JobState|Restarts)=(\w+)", text))
        if fields.get("JobState") == "RUNNING":
            return  # a warning like any other
        self.ending = True
        if int(fields.get("Restarts", 0)) > self.restarts:  # counted as soon as Slurm has decided to requeue
            self._back_in_queue("Slurm took the nodes back and has queued the job again")

    def finish(self, code: int) -> int:
        if self.queued:
            return code
        if self.ending and self.run_dir.status.get("state") not in ("succeeded", "failed"):
            return self._ended_from_outside(code)
        return super().finish(code)

    def yielded(self, code: int) -> int:
        step = self.run_dir.status.get("step")
        if self.requeue:
            self._back_in_queue(f"Slurm asked for the nodes: saved at step {step}, and back in the queue")
            done = subprocess.run(["scontrol", "requeue", self.id], capture_output=True, text=True)
            if done.returncode == 0:
                return code
            self.note("requeue_failed", f"scontrol requeue {self.id} failed: {done.stderr.strip()}")
        self.note("stopped", f"Slurm asked for the nodes: saved at step {step}; lab runs resume goes on")
        self.write(
            {"state": "stopped", "finished": time.time(), "exit_code": code, "restarts": self.restarts}
        )
        return code

    def _back_in_queue(self, message: str) -> None:
        self.queued = True
        self.write({"state": "queued", "restarts": self.restarts + 1})
        self.note("requeued", message)

    def _ended_from_outside(self, code: int) -> int:
        """Slurm ended the job for good: cancelled, or out of time. It is not to be queued again against that."""
        found = _ENDED.findall(self.output())
        why = (found[-1].strip() if found else "").lower()
        changes = {"finished": time.time(), "exit_code": code}
        if why == "time limit" and self.run_dir.status.get("state") != "stopped":
            error = (
                f"Job {self.id} reached its time limit before a checkpoint was whole: raise cluster.options.hours or "
                f"grace_seconds, then lab runs resume {self.run_dir.name}."
            )
            self.write({"state": "failed", "error": error, **changes})
        else:
            self.note("cancelled", f"job {self.id} was ended in Slurm{f' ({why})' if why else ''}")
            self.write({"state": "stopped", **changes})
        return code


class PodJob(Scheduled):
    """In the first pod of a Kubernetes job; its controller starts all pods again after exit code 75."""

    def begin(self) -> None:
        self.restarts = self.run_dir.status.get("restarts") or 0
        super().begin()

    def yielded(self, code: int) -> int:
        step = self.run_dir.status.get("step")
        self.write({"state": "queued", "restarts": self.restarts + 1})
        self.note("requeued", f"the cluster asked for the nodes: saved at step {step}, to be started again")
        return AGAIN


def main(arguments: list[str]) -> int:
    own, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    run_dir = RunDirectory(own[1])
    if own[0] == "slurm":
        return SlurmJob(run_dir, command, requeue="--no-requeue" not in own).run()
    return PodJob(run_dir, command).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
