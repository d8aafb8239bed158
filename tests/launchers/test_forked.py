"""Ranks forked from one process: their place, how a job ends, and that nobody is left."""

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from lab_utils.launchers._forked import command

pytestmark = pytest.mark.slow  # the engine is imported
PROGRAM = """
import os, signal, sys, time
import torch.distributed as dist
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
open(os.path.join(sys.argv[1], f"pid-{rank}"), "w").write(str(os.getpid()))
dist.init_process_group("gloo")
total = [None] * size
dist.all_gather_object(total, rank)
os.write(1, f"heard {total}\\n".encode())  # one write: the ranks share the pipe
if rank == 1 and len(sys.argv) > 2:
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "killed" else sys.exit(7)
if len(sys.argv) > 2:
    time.sleep(300)
"""


def job(folder: Path, *how: str) -> subprocess.CompletedProcess:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return subprocess.run(
        command(3, str(program), str(folder), *how),
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_every_rank_knows_its_place_and_hears_the_others(tmp_path):
    done = job(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("heard [0, 1, 2]") == 3


@pytest.mark.parametrize(
    ("how", "code", "said"), [("killed", 1, "rank 1 was ended by Signal SIGKILL"), ("left", 7, "exit code 7")]
)
def test_a_rank_that_fails_is_named_and_takes_the_others_along(tmp_path, how, code, said):
    done = job(tmp_path, how)
    assert done.returncode == code and said in done.stderr
    ranks = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    assert len(ranks) == 3 and not any(psutil.pid_exists(rank) for rank in ranks)
