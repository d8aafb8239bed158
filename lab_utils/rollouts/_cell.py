"""One run of untrusted Python: the jail is started, followed, ended, and what it reports is judged."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lab_utils.errors import RunError
from lab_utils.rollouts._jail import MEMORY

JAIL = Path(__file__).with_name("_jail.py")
GRACE = 2.0  # seconds beyond the wall time until the sandbox itself is taken to be dead
Status = Literal["passed", "failed", "timeout", "memory", "crashed"]


@dataclass(frozen=True)
class Limits:
    """Of one run.

    Attributes:
        seconds: wall time.
        cpu_seconds: CPU time of each process, rounded up to whole seconds.
        memory_mib: address space of each process.
        processes: of the user that the code runs as; none besides the code itself where that user has more already.
        output_bytes: of standard output and standard error together; more ends the run.
        file_mib: of each file it writes; as root, of all of its working folder.
    """

    seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_mib: int = 512
    processes: int = 16
    output_bytes: int = 1 << 20
    file_mib: int = 16


@dataclass(frozen=True)
class Isolation:
    """What keeps the code apart on this machine.

    Attributes:
        namespaces: no network, no sight of other processes, none survives.
        other_user: it runs as a user that owns nothing else.
        user_namespace: it has no rights over processes of the same user outside.
    """

    namespaces: bool
    other_user: bool
    user_namespace: bool = False

    @property
    def missing(self) -> list[str]:
        """What does not hold, a sentence each; empty where all does."""
        found = []
        if not self.namespaces:
            found.append(
                "Untrusted code can use the network, and what it starts in a session of its own survives it."
            )
        if not self.other_user and os.geteuid() == 0:
            found.append("Untrusted code runs as root: the number of its processes is not limited.")
        if not self.other_user and not self.user_namespace:
            found.append("Untrusted code can read the environment of processes of the same user.")
        return found


_numbers = itertools.count()


def _other_uid() -> int:
    """A user id that nothing else runs as, out of those that this process may take."""
    ranges = [int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    half = min(max(ranges), 2**31) // 2
    return half + (os.getpid() * 4099 + next(_numbers)) % (half - 1)


@dataclass
class Run:
    """One start of the jail; making it is running it.

    Attributes:
        limits, python, isolation: see ``Sandbox``.
        code: to be run.
        statements: tests to run after it; absent: it is a program.
        given: standard input of a program.
        status, passed, stdout, stderr: how it went; ``passed`` for each statement.
    """

    limits: Limits
    python: str
    isolation: Isolation
    code: str
    statements: list[str] | None = None
    given: str = ""
    status: Status = "crashed"
    passed: list[bool] = field(default_factory=list)
    stdout: str = ""
    stderr: str = ""

    def __post_init__(self) -> None:
        self.nonce = secrets.token_hex(16)
        uid = _other_uid() if self.isolation.other_user else None
        folder = tempfile.mkdtemp(prefix="ascent-sandbox-")
        try:
            if uid is not None:
                os.chown(folder, uid, uid)
            self._start(folder, uid)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, folder: str, uid: int | None) -> None:
        limits = self.limits
        told = json.dumps({"nonce": self.nonce, "tests": self.statements or []})
        with _file(self.code) as code, _file(told) as tests, _file(self.given) as given:
            result, result_in = os.pipe()
            status, status_in = os.pipe()
            config = {
                "code": code.fileno(),
                "tests": tests.fileno(),
                "result": result_in,
                "status": status_in,
                "program": self.statements is None,
                "namespaces": self.isolation.namespaces,
                "user_namespace": self.isolation.user_namespace,
                "uid": uid,
                "seconds": limits.seconds,
                "cpu_seconds": max(1, -int(-limits.cpu_seconds // 1)),
                "memory_bytes": limits.memory_mib << 20,
                "processes": limits.processes,
                "file_bytes": limits.file_mib << 20,
            }
            try:
                process = subprocess.Popen(
                    [self.python, "-I", "-S", "-B", "-X", "utf8", str(JAIL), json.dumps(config)],
                    stdin=given if self.statements is None else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=folder,
                    env={},
                    pass_fds=(code.fileno(), tests.fileno(), result_in, status_in),
                    start_new_session=True,
                )
            except OSError as error:
                os.close(result), os.close(status)
                raise RunError(f"The sandbox doesn't start ({error}): check {self.python}.") from None
            finally:
                os.close(result_in), os.close(status_in)
        try:
            out, err = process.stdout.fileno(), process.stderr.fileno()
            self._follow(process, out, err, result, status)
        finally:
            _end(process)
            process.stdout.close(), process.stderr.close(), os.close(result), os.close(status)

    def _follow(self, process: subprocess.Popen, out: int, err: int, result: int, status: int) -> None:
        """Read all that comes until everybody who could write is gone, or time or output is used up."""
        limits = self.limits
        found = {descriptor: bytearray() for descriptor in (out, err, result, status)}
        deadline = time.monotonic() + limits.seconds + GRACE
        late = flood = False
        with selectors.DefaultSelector() as selector:
            for descriptor in found:
                selector.register(descriptor, selectors.EVENT_READ)
            while selector.get_map() and not (late or flood):
                for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                    data = os.read(key.fd, 65536)
                    found[key.fd] += data
                    if not data:
                        selector.unregister(key.fd)
                flood = len(found[out]) + len(found[err]) > limits.output_bytes
                flood |= len(found[result]) + len(found[status]) > limits.output_bytes
                late = time.monotonic() > deadline
        _end(process)
        self.stdout = found[out].decode("utf-8", "replace")
        self.stderr = found[err].decode("utf-8", "replace")[-2000:]
        if flood:
            self.status = "failed"
            self.stderr += f"\nMore than {limits.output_bytes} bytes of output."
        else:
            self._judge(_lines_of(found[status]), _lines_of(found[result]), late)

    def _judge(self, told: list[dict[str, Any]], results: list[dict[str, Any]], late: bool) -> None:
        end = {key: value for line in told for key, value in line.items()}
        code, cpu = end.get("code"), end.get("cpu", 0.0)
        out_of_cpu = code == -signal.SIGKILL and cpu >= self.limits.cpu_seconds - 0.1
        if late or end.get("timeout") or code == -signal.SIGXCPU or out_of_cpu:
            self.status = "timeout"
        elif code in (MEMORY, -signal.SIGKILL):  # a MemoryError, or the kernel's own end to it
            self.status = "memory"
        elif code is None or code < 0:
            self.status = "crashed"
            self.stderr += f"\n{end.get('why', '')}"
        elif self.statements is None:
            self.status = "passed" if code == 0 else "failed"
        else:
            proof = next(
                (r for r in results if secrets.compare_digest(str(r.get("nonce")), self.nonce)), None
            )
            if proof is None:
                self.status = "failed"
                self.stderr += "\nIt ended before its tests were run." if code == 0 else ""
                return
            self.passed = [bool(each) for each in proof["passed"]]
            whole = len(self.passed) == len(self.statements)
            right = whole and all(self.passed) and code == 0
            self.status = "passed" if right else "memory" if proof["memory"] else "failed"


def _file(text: str) -> Any:
    """An open file that holds a text, and has no name."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 -- the caller closes it
    file.write(text.encode("utf-8", "replace"))
    file.seek(0)
    return file


def _lines_of(data: bytearray) -> list[dict[str, Any]]:
    found = []
    for line in bytes(data).splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            found += [value] if isinstance(value, dict) else []
    return found


def _end(process: subprocess.Popen) -> None:
    """Nobody of the process's session goes on; what lives in its namespaces dies with the first there."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
