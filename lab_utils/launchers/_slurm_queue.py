"""What Slurm knows of jobs: ``squeue``, then ``sacct``, then ``scontrol``, asked for all runs at once and seldom.

The controller of a large cluster serves everybody: an answer is good for ``FRESH`` seconds, whoever asks and for
however many runs. Accounting may be absent.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

FRESH = 10.0  # seconds
WANTED = 60.0  # a job that nobody has asked for in so many seconds is not asked after
TIMEOUT = 15.0
_FIELDS = "%i|%T|%r|%L|%P|%S|%N|%j"


class Unreachable(Exception):
    """Slurm cannot be asked from here: no commands, or a controller that doesn't answer."""


class Refused(Exception):
    """A command that ran and said no; its first line."""


@dataclass(frozen=True)
class Job:
    """A line of ``squeue``, or what ``sacct`` and ``scontrol`` have left of it."""

    id: str
    state: str  # PENDING, RUNNING, …
    reason: str = ""
    left: str = ""
    partition: str = ""
    start: str = ""
    nodes: str = ""
    name: str = ""


class Queue:
    """Answers of Slurm, kept for a while. One for the process; any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """The next question goes to Slurm: a job was just submitted or cancelled."""
        with self._lock:
            self._jobs: dict[str, Job | None] = {}
            self._asked: dict[str, float] = {}
            self._at = -1e9
            self._failed: Unreachable | None = None
            self._waiting: dict[str, tuple[float, list[str]]] = {}

    def job(self, number: str) -> Job | None:
        """A job; None for one that Slurm knows no more.

        Raises:
            Unreachable: it cannot be told.
        """
        with self._lock:
            now = time.monotonic()
            self._asked[number] = now
            if now - self._at > FRESH:
                # Those that somebody still asks for: runs that have ended drop out.
                self._asked = {key: at for key, at in self._asked.items() if now - at < WANTED}
                self._jobs, self._failed, self._at = {}, None, now
                try:
                    self._jobs = {job.id: job for job in _squeue("--user", str(os.getuid()))}
                    self._look_up(self._asked)
                except Unreachable as error:
                    self._failed = error
            if self._failed:
                raise self._failed
            if number not in self._jobs:
                self._look_up([number])
            return self._jobs[number]

    def _look_up(self, numbers: Iterable[str]) -> None:
        """Jobs that are not among this user's in the queue: other users', and those that have ended."""
        wanted = list(numbers)
        for ask in (_listed, _accounted, _remembered):
            if missing := [number for number in wanted if number not in self._jobs]:
                self._jobs |= {job.id: job for job in ask(missing)}
        self._jobs |= {number: None for number in wanted if number not in self._jobs}

    def position(self, job: Job) -> int | None:
        """Place among the jobs that wait for the same partition; 1 is next."""
        with self._lock:
            at, order = self._waiting.get(job.partition, (-1e9, []))
            if time.monotonic() - at > 3 * FRESH:
                words = ["--states=PENDING", "--sort=-p,i", "--format=%i", f"--partition={job.partition}"]
                try:
                    order = run("squeue", "--noheader", *words).split()
                except (Unreachable, Refused):
                    order = []
                self._waiting[job.partition] = (time.monotonic(), order)
            return order.index(job.id) + 1 if job.id in order else None


def run(*words: str) -> str:
    """The answer of one of Slurm's commands.

    Raises:
        Unreachable: it isn't here, or the controller doesn't answer.
        Refused: it said no.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, env=_environment())
    except FileNotFoundError:
        raise Unreachable(f"{words[0]} is not installed here") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise Unreachable(f"{words[0]} did not answer: {error}") from None
    if done.returncode == 0:
        return done.stdout
    said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[0]
    if re.search(r"[Uu]nable to contact|[Cc]onnection|[Tt]imed out|communication", said):
        raise Unreachable(said)
    raise Refused(said)


def _environment() -> dict[str, str]:
    """Without formats of one's own (SQUEUE_FORMAT), which would change what is read here, and without the job that a
    JupyterLab on a compute node runs in: its cores and memory are not the new job's."""
    ours = ("SQUEUE_", "SACCT_", "SINFO_", "SLURM_", "SRUN_")
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    return {key: value for key, value in os.environ.items() if key in kept or not key.startswith(ours)}


def _squeue(*words: str) -> list[Job]:
    lines = run("squeue", "--noheader", "--states=all", f"--format={_FIELDS}", *words).splitlines()
    return [Job(*line.split("|", 7)) for line in lines if line.count("|") >= 7]


def _listed(numbers: list[str]) -> list[Job]:
    try:
        return _squeue(f"--jobs={','.join(numbers)}")
    except Refused:  # a single number that Slurm doesn't know
        return []


def _accounted(numbers: list[str]) -> list[Job]:
    try:
        form = "--format=JobIDRaw,State,Partition,NodeList,JobName"
        text = run("sacct", "--noheader", "-X", "-P", form, f"--jobs={','.join(numbers)}")
    except (Unreachable, Refused):  # no accounting here
        return []
    found = []
    for number, state, partition, nodes, name in (
        line.split("|", 4) for line in text.splitlines() if line.count("|") >= 4
    ):
        state = (state.split() or ["UNKNOWN"])[0]  # "CANCELLED by 1000"
        found.append(Job(number, state, partition=partition, nodes=nodes, name=name))
    return found


def _remembered(numbers: list[str]) -> list[Job]:
    """Jobs that the controller remembers for some minutes after their end (MinJobAge)."""
    found = []
    for number in numbers:
        try:
            text = run("scontrol", "show", "job", "-o", number)
        except Refused:
            continue
        fields = dict(re.findall(r"\b(JobId|JobName|JobState|Reason|Partition|NodeList)=(\S*)", text))
        job = Job(number, fields.get("JobState", "UNKNOWN"), reason=fields.get("Reason", ""))
        named = {"partition": "Partition", "nodes": "NodeList", "name": "JobName"}
        found.append(Job(**{**job.__dict__, **{key: fields.get(of, "") for key, of in named.items()}}))
    return found


# -- reading Slurm's forms -----------------------------------------------------------------------------


def seconds(text: str) -> float | None:
    """``2-03:04:05``, ``3:04:05`` or ``4:05``; None for UNLIMITED, INVALID and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if not match:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def duration(hours: float) -> str:
    """Hours as ``--time`` takes them."""
    minutes = max(1, round(hours * 60))
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"


def host_names(text: str) -> tuple[str, ...]:
    """``n[01-03,7],m`` as names; Slurm's own form of a list."""
    names: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text if text not in ("(null)", "None") else ""):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if not match:
            names.append(part)
            continue
        for piece in match[2].split(","):
            first, _, last = piece.partition("-")
            for number in range(int(first), int(last or first) + 1):
                names.append(f"{match[1]}{number:0{len(first)}d}{match[3]}")
    return tuple(names)


def first_of(ask: Callable[[], str]) -> str:
    """The answer of a command, "" where Slurm can't or won't give it."""
    try:
        return ask()
    except (Unreachable, Refused):
        return ""


QUEUE = Queue()
