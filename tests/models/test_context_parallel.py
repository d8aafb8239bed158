"""Rows cut over real ranks give the states, losses and gradients of whole rows."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from lab_utils.launchers._forked import command

HERE = Path(__file__).with_name("context_parallel_trial.py")
ROOT = HERE.parents[2]


def found(folder: Path, ranks: int, seed: int, phase: str) -> dict[str, torch.Tensor]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command(ranks, str(HERE), str(folder), str(seed), phase),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / f"{ranks}-{seed}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed, ranks, phase", [(0, (2, 8), "sparse"), (1, (4,), "sparse"), (2, (2,), "warmup")]
)
def test_rows_cut_over_ranks_are_whole_rows(
    tmp_path: Path, seed: int, ranks: tuple[int, ...], phase: str
) -> None:
    whole = found(tmp_path, 1, seed, phase)
    losses = {"total of indexer_kl"} | (
        {"total of mtp_loss", "total of aux_loss"} if phase == "sparse" else set()
    )
    assert losses < set(whole)
    for count in ranks:
        cut = found(tmp_path, count, seed, phase)
        assert cut.keys() == whole.keys()
        for name, expected in whole.items():
            # In fp64, where only the order of sums differs. What fp32 is kept in for its own sake is as good as that.
            scale = expected.norm().clamp(min=1e-6)
            exact = name == "load" or name.startswith("count")
            assert (cut[name] - expected).norm() <= (0 if exact else 1e-6) * scale, (count, name)
