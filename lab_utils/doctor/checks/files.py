"""The file system of the runs: shared, writable, with renames and locks that hold."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lab_utils.doctor._machine import Machine, Row

ORDER = 40
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "cifs", "glusterfs", "fuse.glusterfs", "dpc",
          "fuse.juicefs", "fuse.sshfs", "9p", "virtiofs", "afs", "pvfs2", "orangefs", "wekafs", "quobyte")  # fmt: skip
GONE = ("tmpfs", "ramfs")  # after the next reboot
_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def check(machine: Machine) -> list[Row]:
    rows = [_type(machine)]
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=machine.folder) as folder:
            rows += [
                Row("runs folder", True, f"{machine.folder} can be written"),
                _rename(Path(folder)),
                _lock(Path(folder)),
            ]
    except OSError as error:
        advice = "Choose a folder that you may write by ASCENT_RUNS, or ask for the right to write there."
        rows.append(Row("runs folder", False, f"{machine.folder}: {error.strerror or error}", advice))
    return rows


def mount_of(folder: Path, mounts: str) -> tuple[str, str] | None:
    """Mount point and type of the file system of ``folder``, from the text of /proc/mounts."""
    found: tuple[str, str] | None = None
    for line in mounts.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        point = words[1].replace("\\040", " ")
        within = folder == Path(point) or Path(point) in folder.parents
        # The longest wins, and of equal ones the later: it lies on top.
        if within and (found is None or len(point) >= len(found[0])):
            found = (point, words[2])
    return found


def _type(machine: Machine) -> Row:
    try:
        mounts = (machine.system / "proc" / "mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Row("file system", None, "its type cannot be told here: no /proc/mounts")
    found = mount_of(machine.folder.resolve(), mounts)
    if found is None:
        return Row("file system", None, f"{machine.folder} is below no known mount")
    point, kind = found
    shown = f"{kind} at {point}"
    if kind in SHARED:
        return Row("file system", True, f"{shown}, shared")
    if kind in GONE:
        advice = "It is memory, and empty after a reboot: put runs on a disk by ASCENT_RUNS."
        return Row("file system", False, shown, advice)
    if machine.has_slurm:
        advice = "Slurm's nodes don't see a local disk: put runs on the shared one by ASCENT_RUNS."
        return Row("file system", False, f"{shown}, local", advice)
    return Row(
        "file system", True, f"{shown}, local", "Good for jobs on this machine; other nodes would not see it."
    )


def _rename(folder: Path) -> Row:
    """A reader sees the old file or the new one: the same inode under the new name, and nothing left of the old."""
    old, new = folder / "old", folder / "new"
    old.write_text("new content")
    new.write_text("old content")
    inode = old.stat().st_ino
    os.replace(old, new)
    if new.read_text() == "new content" and new.stat().st_ino == inode and not old.exists():
        return Row("rename", True, "replaces a file at once")
    advice = (
        "This file system copies instead of renaming; a reader may see half a status: put runs elsewhere."
    )
    return Row("rename", False, "is no atomic replacement", advice)


def _lock(folder: Path) -> Row:
    """Another process is kept out while this one holds the lock."""
    import fcntl

    path = folder / "lock"
    command = [sys.executable, "-c", _LOCK, str(path)]
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            advice = "Have it mounted with locks (NFS: without nolock; Lustre: with flock)."
            return Row("locks", False, f"flock: {error.strerror or error}", advice)
        kept_out = subprocess.run(command, capture_output=True, timeout=30).returncode != 0
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_UN)
    if kept_out:
        return Row("locks", True, "flock keeps another process out")
    advice = "Locks are ignored here (NFS with local_lock, Lustre without flock): have it mounted with them."
    return Row("locks", False, "flock lets two processes in", advice)
