"""A Slurm of two nodes on this machine, for tests: Debian's slurmctld and two slurmd, as root, in a folder of its own.

No munge, no accounting, no cgroups, nothing of systemd: it works in a container. Chips are a generic resource whose
device files are empty files.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
from system_packages import installed

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
START_SECONDS = 60
CHIPS = 8

CONFIGURATION = """\
ClusterName=ascent
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
PlugStackConfig=/dev/null
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
GresTypes=npu
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] \\
  CPUs=2 RealMemory=100 Gres=npu:{chips}
PartitionName=main Nodes=ALL Default=YES MaxTime=7-0 PriorityTier=1 GraceTime=40 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL PriorityTier=100 PreemptMode=OFF
"""


class Missing(Exception):
    """Why there can be no Slurm here."""


class Slurm:
    """The running daemons; ``stop`` ends them and every process of their jobs."""

    def __init__(self) -> None:
        # Short: a socket lies in it, whose path has a limit.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.configuration = self.folder / "slurm.conf"
        self.daemons: list[subprocess.Popen] = []

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        self.folder.chmod(0o755)
        for name in ("state", "spool-n0", "spool-n1", "dev"):
            (self.folder / name).mkdir()
        for number in range(CHIPS):
            (self.folder / "dev" / f"davinci{number}").touch()
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(host=host, folder=self.folder, ports=_ports(), chips=CHIPS)
        self.configuration.write_text(text)
        devices = f"Name=npu File={self.folder}/dev/davinci[0-{CHIPS - 1}]\n"
        (self.folder / "gres.conf").write_text("AutoDetect=off\n" + devices)
        for words in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n0"], ["slurmd", "-D", "-N", "n1"]):
            with (self.folder / f"{'-'.join(words)}.out").open("wb") as out:
                self.daemons.append(
                    subprocess.Popen(
                        [
                            "setpriv",
                            "--pdeathsig",
                            "KILL",
                            *words,
                        ],  # not longer than the tests, whatever ends them
                        env=self.environment,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        end = time.monotonic() + START_SECONDS
        while (
            self.ask("sinfo", "--noheader", "--partition=main", "--format=%t %D", check=False).strip()
            != "idle 2"
        ):
            dead = next((daemon for daemon in self.daemons if daemon.poll() is not None), None)
            if dead is not None or time.monotonic() > end:
                what = f"{dead.args} ended" if dead else f"no two idle nodes within {START_SECONDS} s"
                raise Missing(f"Slurm does not start here: {what}; {self.last_words()}")
            time.sleep(0.3)

    def last_words(self) -> str:
        found = []
        for path in sorted(self.folder.glob("*.log")):
            lines = [
                line
                for line in path.read_text(errors="replace").splitlines()
                if "error" in line or "fatal" in line
            ]
            found += [f"{path.name}: {line}" for line in lines[-2:]]
        return " | ".join(found)

    def ask(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
        return done.stdout

    def stop(self) -> None:
        for words in (
            ["scancel", "--signal=KILL", "--full", f"--user={os.getuid()}"],
            ["scancel", f"--user={os.getuid()}"],
        ):
            subprocess.run(words, env=self.environment, capture_output=True, timeout=30)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._left():
            try:
                process.kill()
            except psutil.Error:
                continue
        shutil.rmtree(self.folder, ignore_errors=True)

    def _left(self) -> list[psutil.Process]:
        """slurmstepd and jobs that outlived their daemons: they carry this cluster's configuration."""
        found = []
        for process in psutil.process_iter():
            try:  # slurmstepd writes its title over the beginning, which psutil's own reading does not expect
                variables = Path(f"/proc/{process.pid}/environ").read_bytes()
            except OSError:
                continue
            if process.pid != os.getpid() and f"SLURM_CONF={self.configuration}\0".encode() in variables:
                found.append(process)
        return found


def install() -> None:
    """Have the programs on this machine; skips the test that asks where they can't be had.

    Raises:
        Missing: there are no rights to start daemons.
    """
    if os.geteuid() != 0:
        raise Missing("Slurm's daemons are started as root, and this is not root")
    os.environ["PATH"] += "" if "/usr/sbin" in os.environ["PATH"] else os.pathsep + "/usr/sbin"
    installed(PROGRAMS, PACKAGES)


def _ports() -> list[int]:
    """A free port, and two free ones in a row."""

    def free(port: int) -> bool:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
            return True

    for first in range(36817 + os.getpid() % 500 * 4, 60000, 3):
        if all(free(first + more) for more in range(3)):
            return [first, first + 1, first + 2]
    raise Missing("no three free ports in a row")
