"""At the start a rank reads the bytes of its own shard and no others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lab_utils.engine.trial import write_source

# One rank of 8 in a process of its own: the other ranks are torch's "fake" backend.
WORKER = """
import json, sys
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from lab_utils.engine import colossal
from lab_utils.accelerators import get_accelerator
from lab_utils.models.deepseek_v4.formats.reader import CheckpointReader
from lab_utils.models.load import load_model
from lab_utils.recipe import ParallelSection

source, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
colossal.set_accelerator(colossal.CompleteCpu())
layout = colossal.plugin(ParallelSection(ep=2, pp=2), micro_rows=1)
read = []
close = CheckpointReader.close
CheckpointReader.close = lambda self: (read.append(self.bytes_read), close(self))[1]
model = load_model(source, mtp_loss=0.3, defer=True)
assert all(p.is_meta for p in model.parameters())
layout.cut(model)
whole = load_model(source, mtp_loss=0.3).state_dict()
same = True
for name, tensor in model.state_dict(keep_vars=True).items():
    start = getattr(tensor, "rows", (0,))[0]
    same &= torch.equal(tensor.detach(), whole[name][start:start + len(tensor)])
held = sum(t.nbytes for t in model.state_dict().values())
print(json.dumps({"read": read[0], "held": held, "whole": read[1], "same": bool(same)}))
"""


@pytest.mark.slow
def test_a_rank_reads_what_it_holds(tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    found = []
    for rank in (0, 3):  # first stage, first experts; second stage, second experts
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(tmp_path / "source"), str(rank)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    for told in found:
        assert told["same"], "values and rows are those of the whole checkpoint"
        assert told["read"] == told["held"] < 0.6 * told["whole"], told
