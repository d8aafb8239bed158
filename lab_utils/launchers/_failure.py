"""Why a job failed, in one sentence: from signals, the ranks' own reports and the ends of their logs."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from lab_utils.launchers._ascend_errors import ECHO, first_error
from lab_utils.launchers._base import log_files, tail
from lab_utils.runs.directory import RunDirectory, read_json

# Signals that end a process from outside its own program, or by a fault in native code. SIGTERM is not among
# them: torchrun sends it to the ranks that are left.
FATAL = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
_TIME = re.compile(r"^\s*time\s*:\s*(\S+)", re.MULTILINE)
_RANK = re.compile(r"^\s*rank\s*:\s*(\d+)", re.MULTILINE)
_EXIT = re.compile(r"^\s*exitcode\s*:\s*(-?\d+)\s*\(pid: (\d+)\)", re.MULTILINE)
_ERROR_LINE = re.compile(r"^(?:error: |\w*(?:Error|Exception): )(.+)$")
# What a rank says when another one vanished: a consequence, never the cause.
PEER_LOST = re.compile(
    r"connection (?:closed|reset|refused)|lost its connection|broken pipe|gloo|heartbeat|store", re.IGNORECASE
)


@dataclass(frozen=True)
class Exit:
    """How a rank ended, as torchrun saw it; a negative code is a signal."""

    rank: int
    code: int
    first: bool  # the first failure that torchrun observed

    @property
    def signal(self) -> signal.Signals | None:
        try:
            return signal.Signals(-self.code) if self.code < 0 else None
        except ValueError:
            return None


def parse_torchrun(text: str) -> list[Exit]:
    """The failures that torchrun lists as it gives up, the first observed one first.

    Each node has a torchrun of its own: of several lists, the root cause that is the earliest is the first.
    """
    roots: list[tuple[str, Exit]] = []
    others: list[Exit] = []
    for table in re.split(r"^Failures:", text, flags=re.MULTILINE):
        head, found_root, root = table.rpartition("Root Cause")
        for time, rank, (code, _) in zip(_TIME.findall(root), _RANK.findall(root), _EXIT.findall(root)):
            failure = Exit(int(rank), int(code), bool(found_root))
            roots.append((time, failure)) if found_root else others.append(failure)
        others += [Exit(int(r), int(c), False) for r, (c, _) in zip(_RANK.findall(head), _EXIT.findall(head))]
    ordered = [failure for _, failure in sorted(roots, key=lambda pair: pair[0])]
    return ordered[:1] + [Exit(e.rank, e.code, False) for e in ordered[1:]] + others


def rank_reports(logs: Path, since: float) -> list[dict]:
    """Sentences that ranks left as they failed in this attempt, the earliest first."""
    found = [read_json(path) for path in logs.glob("rank-*.error.json")]
    return sorted((r for r in found if r.get("error") and r.get("time", 0) >= since), key=lambda r: r["time"])


def last_words(path: Path) -> str | None:
    """The last line of a log that looks like an error, else its last line that says anything."""
    lines = [line.strip() for line in tail(path, 60).splitlines() if line.strip()]
    return error_line(path) or (lines[-1] if lines else None)


def error_line(path: Path) -> str | None:
    """The last line of a log that looks like an error."""
    found = (_ERROR_LINE.match(line.strip()) for line in reversed(tail(path, 60).splitlines()))
    return next((match.group(1) for match in found if match), None)


def killed_by(rank: int, number: signal.Signals, name: str) -> str:
    """A rank's death by a signal as one sentence."""
    causes = {
        signal.SIGKILL: "as the kernel does when memory runs out: lower schedule.micro_rows if dmesg says so",
        signal.SIGSEGV: f"a fault in native code: logs/rank-{rank}.log has the stack",
        signal.SIGBUS: "mostly a full /dev/shm or a file cut while mapped: free space there",
        signal.SIGABRT: f"an assertion in native code: logs/rank-{rank}.log has its words",
    }
    cause = causes.get(number, f"see logs/rank-{rank}.log")
    killed = f"Rank {rank} was killed by {number.name} (signal {number.value})"
    return f"{killed}, {cause}; then lab runs resume {name}."


def diagnose(run_dir: RunDirectory, *, since: float, launcher_text: str, code: int) -> tuple[str, int | None]:
    """The sentence for status.json and the rank that it speaks of.

    In this order: a rank that was killed; the first error of an Ascend chip, where what the ranks say only repeats it;
    what the worker itself wrote; the earliest rank that left a report; the last words of the first rank that failed;
    the launcher's.

    Args:
        run_dir: the run.
        since: when this attempt began, seconds since the epoch.
        launcher_text: what torchrun printed in this attempt.
        code: its exit code.
    """
    exits, reports = parse_torchrun(launcher_text), rank_reports(run_dir.logs, since)
    status = run_dir.status
    own = status.get("error") if status.get("state") == "failed" else None
    first = next((e for e in exits if e.first), None)
    killed = next((e for e in exits if e.signal in FATAL), None)
    heard = own or (reports[0]["error"] if reports else None)
    if killed and killed.signal and (killed.first or not heard or PEER_LOST.search(heard)):
        return killed_by(killed.rank, killed.signal, run_dir.name), killed.rank
    vague = not heard or PEER_LOST.search(heard) or ECHO.search(heard)
    if vague and (finding := first_error(run_dir.logs, since)):
        return finding.sentence(run_dir.name), finding.rank
    if own:
        return own, status.get("failed_rank")
    if reports:
        return reports[0]["error"], reports[0]["rank"]
    if first:
        words = last_words(run_dir.logs / f"rank-{first.rank}.log") or "it left no message"
        return f"Rank {first.rank} ended with exit code {first.code}: {words.rstrip('.')}.", first.rank
    launcher, *rest = log_files(run_dir.logs)
    # Where there are nodes, a script that ends before torchrun has its words in one of theirs.
    starters = [*(path for path in rest if path.name.startswith("node-")), launcher]
    said = [(path, words) for say in (error_line, last_words) for path in starters if (words := say(path))]
    path, words = (*said, (launcher, "it left no message"))[0]
    return f"The launcher ended with exit code {code}: {words.rstrip('.')} (logs/{path.name}).", None
