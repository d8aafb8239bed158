"""Saved under each of four layouts, resumed under each of the four: ``torchrun --nproc-per-node=4 resume_matrix.py
FOLDER``; writes the largest departure from an undisturbed run as JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lab_utils.accelerators import get_accelerator
from lab_utils.engine import colossal
from lab_utils.engine.control import Stop
from lab_utils.engine.engine import Engine
from lab_utils.engine.reduce import over_ranks
from lab_utils.engine.trial import build_trial, passes, trial_recipe, write_source
from lab_utils.engine.verify import shared_truth
from lab_utils.planner.layouts import layout_names
from lab_utils.runs.directory import RunDirectory

LAYOUTS = ("dp2_cp2_ep1_pp1", "dp4_ep4_pp1", "dp2_ep2_pp2", "dp1_ep1_pp4")
BEFORE, AFTER = 3, 3


def opened(recipe: Any, folder: Path, truth: Any) -> Engine:
    dist.barrier()
    engine = Engine(recipe, get_accelerator("cpu"), RunDirectory(folder), build_trial)
    engine.open()
    engine.parts.train.routing = truth.routing
    return engine


def steps(engine: Engine, expected: list[dict[str, float]]) -> float:
    """Largest relative error of a loss over some steps, the indexer's aside (see ``engine/verify.py``)."""
    worst = 0.0
    for losses in expected:
        metrics = engine.forward_backward(engine.load(Stop.NO))
        reduced = over_ranks(metrics, engine.device)
        pairs = [(reduced[k].value, v) for k, v in losses.items() if k != "train/indexer_kl"]
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in pairs))
        engine.update(metrics)
    return worst


def main(folder: Path) -> None:
    colossal.start(get_accelerator("cpu"), 0)
    rank, source, result = dist.get_rank(), folder / "source", {}
    if rank == 0:
        write_source(source)
    dist.barrier()
    for kind in ("adamw", "muon"):
        changes = {"optim.kind": kind, "schedule.steps": BEFORE + AFTER, "cluster.accelerator": "cpu"}
        truth = shared_truth(str(source), changes, folder)
        layouts = {name: layout_names(4)[name] for name in LAYOUTS}
        recipes = {
            name: trial_recipe(str(source), {**changes, **layout, **passes(layout, 4)})
            for name, layout in layouts.items()
        }
        for saved in LAYOUTS:
            first = folder / f"{kind}-{saved}"
            if rank == 0:
                first.mkdir()
                RunDirectory(first).write_status(state="created")
            engine = opened(recipes[saved], first, truth)
            engine.load(Stop.NO)  # batch 0 is for gradients
            steps(engine, truth.losses[:BEFORE])
            engine.save()
            engine.writer.finish()
            engine.layout.pg_mesh.destroy_mesh_process_groups()
            for resumed in LAYOUTS if kind == "adamw" else LAYOUTS[2:]:
                again = folder / f"{kind}-{saved}-{resumed}"
                if rank == 0:
                    shutil.copytree(first, again)
                engine = opened(recipes[resumed], again, truth)
                assert engine.progress.step == BEFORE
                result[f"{kind}: {saved} to {resumed}"] = steps(engine, truth.losses[BEFORE:])
                engine.layout.pg_mesh.destroy_mesh_process_groups()
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    colossal.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
