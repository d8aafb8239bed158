"""The first error of a job on Ascend chips: its meaning, and one thing to do.

CANN writes a ``plog`` for every process, torch_npu prints its codes into the rank's own log, and one fault makes
hundreds of lines in all of them. So: collect the lines with a known signature from all ranks, order them by time, take
the first that is no mere wrapper around another. Which codes there are, and what they mean, is from the error tables of
CANN and torch_npu and from public reports; none of it was seen on a chip here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 20_000_000  # of one file; a process that logs more has said the first error long before
_TIME = re.compile(r"\b(\d{4}-\d\d-\d\d-\d\d:\d\d:\d\d(?:\.\d{3}\.\d{3})?)")
_HEAD = re.compile(r"^\[ERROR\] \w+\(\d+,[^)]*\):")  # module and process; its number is no error code
_LEVEL = re.compile(r"^\[(DEBUG|INFO|WARNING|EVENT|TRACE)\]")
_HEADER = re.compile(r"^--- rank (\d+), process (\d+)(?: on (\S+?))?,")
_PID = re.compile(r"plog-(\d+)_")
EXCLUDE = "leave its node out (cluster.options.exclude), resume, and report the chip to the administrator"


def _code(*numbers: str) -> str:
    """A number where it stands as an error code; thread and process ids look the same."""
    listed = "|".join(numbers)
    return rf"(?i:err\w*|\bcode|ret\w*|result)[^\d\n]{{0,20}}(?:{listed})\b"


@dataclass(frozen=True)
class Signature:
    """What a line with an error means."""

    name: str
    pattern: re.Pattern[str]
    meaning: str
    action: str
    wrapper: bool = False  # says only that something else went wrong


def _signature(name: str, pattern: str, meaning: str, action: str, wrapper: bool = False) -> Signature:
    return Signature(name, re.compile(pattern), meaning, action, wrapper)


SIGNATURES = (
    _signature(
        "EI0006",
        r"\bEI0006\b|[Ss]ocket establish timeout|socket times out",
        "a link to another rank was not set up in time",
        "find the rank that never arrived in the other logs; interface, subnet and TLS must be the same on all nodes "
        "(cluster.options.interface), and a large job may need a longer HCCL_CONNECT_TIMEOUT",
    ),
    _signature(
        "EI0002",
        rf"\bEI0002\b|{_code('507048')}",
        "another rank was silent in a collective",
        "look at the rank that ended first; if it was only slow (data, a checkpoint), raise HCCL_EXEC_TIMEOUT",
    ),
    _signature(
        "EI0004", r"\bEI0004\b", "the rank table is wrong", "unset RANK_TABLE_FILE: torchrun gives the ranks"
    ),
    _signature(
        "EI0013", r"\bEI0013\b", "the RoCE network failed", "ask the administrator to check the links"
    ),
    _signature(
        "EJ0001",
        r"\bEJ0001\b",
        "a process of before still holds the chip",
        "wait ten seconds, end what is left on that node (npu-smi info), and resume",
    ),
    _signature(
        "HBM memory error",
        rf"HBM MULTI BIT ECC|UCE ERROR|{_code('507053', '507054')}|0x80[Ee]01801|0x80[Ee]18400",
        "the chip's memory is faulty",
        EXCLUDE,
    ),
    _signature(
        "HBM wear",
        r"0x80[Ee]1840[12]",
        "the chip has set aside rows of worn memory",
        "ask the administrator to reset the chip, or replace it where that doesn't help",
    ),
    _signature(
        "temperature", r"0x80[Ee]0020[9Bb]", "the chip is too hot", "stop, and have the cooling checked"
    ),
    _signature(
        "link down",
        rf"link_status[^\d\n]{{0,4}}0\b|Comp_Network|{_code('507904', '507057')}",
        "a chip's network link is down",
        f"check it with hccn_tool -i N -link -g; {EXCLUDE}",
    ),
    _signature(
        "out of memory",
        r"\bEL0004\b|NPU out of memory",
        "the chip's memory is full",
        "lower schedule.micro_rows, or raise parallel degrees; HCCL's buffers take 400 MB a communicator",
    ),
    _signature(
        "107001",
        _code("107001"),
        "a rank asked for a chip that isn't there",
        "give cluster.nproc as many ranks as a node has visible chips (ASCEND_RT_VISIBLE_DEVICES)",
    ),
    _signature(
        "507011",
        _code("507011", "507049"),
        "an operator failed on the chip",
        "resume; if the same node fails again, leave it out (cluster.options.exclude), else it is the input",
    ),
    _signature(
        "507046",
        rf"\bEE1002\b|{_code('507046')}",
        "waiting for the chip took too long, a consequence of something else",
        "run again with ASCEND_LAUNCH_BLOCKING=1 in cluster.options.environment to see where",
        wrapper=True,
    ),
    _signature(
        "ERR02200",
        r"\bERR\d{5}\b",
        "a call of torch_npu failed",
        "read the first EI, EE, EL or EJ code in the earliest plog of the run",
        wrapper=True,
    ),
)
# An exception that only repeats what the chip's own logs say better.
ECHO = re.compile(r"\bERR\d{5}\b|\bE[A-Z]\d{4}\b|HCCL|hccl|\bACL\b|\bacl\w+|\b507\d{3}\b|107001|NPU|npu")


@dataclass(frozen=True)
class Finding:
    """A line with a known signature."""

    time: str
    signature: Signature
    file: Path
    rank: int | None
    host: str | None

    def sentence(self, run: str) -> str:
        who = "A rank" if self.rank is None else f"Rank {self.rank}"
        where = f" on {self.host}" if self.host else ""
        place = self.file.name if self.file.parent.name == "logs" else f"ascend/…/{self.file.name}"
        what = f"{who}{where} met {self.signature.name}: {self.signature.meaning}; {self.signature.action}"
        return f"{what} (logs/{place}); then lab runs resume {run}."


def first_error(logs: Path, since: float) -> Finding | None:
    """The first known error in the logs of all ranks.

    Args:
        logs: ``logs/`` of the run: ``rank-*.log``, and CANN's own below ``ascend/``.
        since: when this attempt began, seconds since the epoch; older files are of earlier attempts.
    """
    ranks: dict[str, tuple[int, str | None]] = {}
    found: list[Finding] = []
    for path in sorted(logs.glob("rank-*.log")):
        lines = _last_attempt(path)
        for line in lines[:1]:
            if match := _HEADER.match(line):
                ranks[match[2]] = (int(match[1]), match[3])
        number = int("".join(filter(str.isdigit, path.stem)) or 0)
        host = next((where for rank, where in ranks.values() if rank == number), None)
        if path.stat().st_mtime >= since:
            found += _findings(lines, path, number, host)
    for path in sorted(logs.glob("ascend/**/plog-*.log")):
        if path.stat().st_mtime >= since:
            match = _PID.match(path.name)
            rank, host = ranks.get(match[1], (None, None)) if match else (None, None)
            found += _findings(_lines(path), path, rank, host)
    return min(found, key=lambda finding: (finding.signature.wrapper, finding.time), default=None)


def _findings(lines: list[str], path: Path, rank: int | None, host: str | None) -> Iterator[Finding]:
    at = "9999"  # a line without a time, before any that has one
    for line in lines:
        if match := _TIME.search(line):
            at = match[1]
        if _LEVEL.match(line):
            continue
        text = _HEAD.sub("", line)
        signature = next((s for s in SIGNATURES if s.pattern.search(text)), None)
        if signature:
            yield Finding(at, signature, path, rank, host)


def _last_attempt(path: Path) -> list[str]:
    """Lines of a rank's log from the last start of its process on."""
    lines = _lines(path)
    starts = [number for number, line in enumerate(lines) if _HEADER.match(line)]
    return lines[starts[-1] :] if starts else lines


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream:
            return stream.read(MOST_BYTES).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
