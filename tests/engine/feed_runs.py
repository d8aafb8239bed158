"""Runs one after the other in the same ranks: ``torchrun … feed_runs.py FOLDER RUN[=EARLIER] …``.

A run is a folder there with a recipe; one with ``=EARLIER`` goes on from what that one left. Importing ColossalAI takes
seconds a process, so many runs share a launch.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from lab_utils.accelerators import get_accelerator
from lab_utils.engine import colossal
from lab_utils.engine.engine import Engine
from lab_utils.runs.directory import RunDirectory


def main(folder: Path, names: list[str]) -> None:
    accelerator = get_accelerator("cpu")
    colossal.start(accelerator, 0)
    for name in names:
        name, _, earlier = name.partition("=")
        if earlier and dist.get_rank() == 0:
            own = shutil.ignore_patterns("recipe.yaml")
            shutil.copytree(folder / earlier, folder / name, ignore=own, dirs_exist_ok=True)
        dist.barrier()
        run = RunDirectory(folder / name)
        engine = Engine(run.recipe, accelerator, run)
        engine.fit()
        engine.layout.pg_mesh.destroy_mesh_process_groups()
    colossal.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
