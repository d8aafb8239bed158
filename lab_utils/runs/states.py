"""States of a run and the ways between them.

``created`` → ``queued`` → ``running`` → (``stopping`` →) ``succeeded`` | ``stopped`` | ``failed``; ``lost``
is concluded by a reader: the heartbeat is old and the launcher no longer knows the job. A run that has ended
can be queued again, or taken up by a worker that was started by hand.
"""

from __future__ import annotations

from enum import StrEnum

from lab_utils.errors import RunError

ACTIVE = frozenset({"queued", "running", "stopping"})
FINAL = frozenset({"stopped", "succeeded", "failed", "lost"})
STATES = ("created", "queued", "running", "stopping", "stopped", "succeeded", "failed", "lost")

_AGAIN = {"queued", "running"}
ALLOWED: dict[str, set[str]] = {
    "created": {"queued", "running", "stopped", "failed", "lost"},
    "queued": {"running", "stopping", "stopped", "succeeded", "failed", "lost"},
    "running": {"queued", "stopping", "stopped", "succeeded", "failed", "lost"},
    "stopping": {"stopped", "succeeded", "failed", "lost"},
    # A rank that torchrun ends because another one died may call itself stopped; the supervisor knows better.
    "stopped": _AGAIN | {"failed"},
    "succeeded": _AGAIN,
    "failed": _AGAIN,
    "lost": _AGAIN | {"stopped", "succeeded", "failed"},
}

# Seconds without a heartbeat after which a job that its launcher doesn't know is lost. Writers beat every few
# seconds; the margin is for clocks of two machines and a slow shared file system.
STALE_SECONDS = 30.0
# The same where the launcher cannot tell: the run was started on another machine.
STALE_SECONDS_ELSEWHERE = 600.0


class JobState(StrEnum):
    """What a launcher knows of a job."""

    PENDING = "pending"  # waits for a place
    RUNNING = "running"
    GONE = "gone"  # not known, or ended
    UNKNOWN = "unknown"  # cannot be told from this machine


def transition(old: str | None, new: str) -> str:
    """The state after writing ``new`` over ``old``.

    A worker that reports ``running`` after a stop was requested doesn't undo the request.

    Raises:
        RunError: there is no way from ``old`` to ``new``.
    """
    if new not in STATES:
        raise RunError(f"'{new}' is no state of a run: use one of {', '.join(STATES)}.")
    if old is None or old == new or old not in ALLOWED:
        return new
    if old == "stopping" and new in ("running", "queued"):
        return old
    if new not in ALLOWED[old]:
        raise RunError(f"A run cannot go from '{old}' to '{new}': only to {', '.join(sorted(ALLOWED[old]))}.")
    return new


def derive(stored: str | None, beat: float | None, now: float, job: JobState) -> str:
    """The state as a reader should see it.

    Args:
        stored: what status.json says; None where it cannot be read.
        beat: time of the last heartbeat, seconds since the epoch.
        now: the present on the same clock.
        job: what the launcher knows.
    """
    if stored is None:
        return "lost"
    if stored not in ACTIVE and stored != "created":
        return stored
    age = now - (beat or 0.0)
    if job == JobState.PENDING and stored in ("running", "stopping") and age > STALE_SECONDS:
        return "queued"  # its scheduler took the nodes without a word and will start it again
    if job == JobState.GONE and age > STALE_SECONDS:
        return "lost"
    if job == JobState.UNKNOWN and age > STALE_SECONDS_ELSEWHERE:
        return "lost"
    return stored
