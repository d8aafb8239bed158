"""A very large run that is played: a stand-in that writes the files of one, without a chip or a rank.

``python -m lab_utils.bench._played RUN nodes=128 chips=16 step_seconds=3 chip_seconds=2 seconds=600`` writes what so
many nodes would write, at the rate at which they would: lines of metrics, samples of the chips, logs, answers. Only
the numbers in the files are made up.
"""

from __future__ import annotations

import math
import os
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory, create
from lab_utils.telemetry import chip_log, jsonl
from lab_utils.telemetry.chips import aggregate

PARTS = {"forward_backward": 0.78, "communication": 0.11, "optimizer": 0.06, "data": 0.01, "other": 0.04}


def prepare(root: Path, *, nodes: int, chips: int, steps: int) -> RunDirectory:
    """A run directory with the metrics of ``steps`` steps, of a run that goes on."""
    recipe = Recipe.load("sft_tiny").with_changes(
        {
            "name": "stand_in",
            "cluster.nodes": nodes,
            "cluster.nproc": chips,
            "cluster.accelerator": "npu",
            "schedule.steps": max(4 * steps, 2000),
        }
    )
    run = create(recipe, root)
    now = time.time()
    lines = (jsonl.encode(metrics(step, now - 3.0 * (steps - step))) for step in range(1, steps + 1))
    (run.path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    run.write_status(
        state="running", step=steps, started=now - 3.0 * steps, world_size=nodes * chips, launcher="local"
    )
    return run


def metrics(step: int, now: float) -> dict[str, Any]:
    """A line as the engine logs it; the numbers are made up."""
    made = random.Random(step)
    noise = made.gauss(0.0, 1.0)
    loss = 0.55 + 1.9 * math.exp(-step / 900) + 0.03 * noise
    seconds = 3.0 + 0.08 * abs(noise)
    row = {
        "step": step,
        "time": round(now, 3),
        "train/global_step": float(step),
        "train/loss": loss,
        "train/mean_token_accuracy": 0.9 - 0.35 * math.exp(-step / 900) + 0.004 * noise,
        "train/grad_norm": 0.8 + 0.2 * abs(noise),
        "train/learning_rate": 2e-5 * min(step / 100, 1.0),
        "train/num_tokens": 4.2e6 * step,
        "train/entropy": 1.1 + 0.02 * noise,
        "train/indexer_kl": 0.02 + 0.002 * noise,
        "train/skipped_steps": 0.0,
        "perf/step_time": seconds,
        "perf/tokens_per_s": 4.2e6 / seconds,
        "perf/mfu": 0.38 / (seconds / 3.0),
        "perf/padding_frac": 0.02,
        "mem/allocated_peak": 57.0,
        "chip/util_mean": 64.0 + noise,
        "chip/util_min": 41.0 + 3 * noise,
        "chip/hbm_frac": 0.92,
        "chip/power": 310.0 + 4 * noise,
    }
    row |= {f"perf/time/{part}": share * seconds for part, share in PARTS.items()}
    row |= {f"moe/{name}": 0.3 + 0.02 * noise for name in ("cv_mean", "cv_max", "max_violation", "bias_norm")}
    if step % 200 == 0:
        row["eval/loss"] = loss + 0.05
    return row


def sample(node: int, chips: int, now: float, made: random.Random) -> dict[str, Any]:
    """What a node's sampler writes: chips busy with one step after the other, a few of them in trouble."""
    rows = []
    for index in range(chips):
        used = min(max(made.gauss(66.0, 7.0), 0.0), 100.0)
        if (node, index) == (37, 5):
            used = 2.0  # nothing to do
        sick = (node, index) == (90, 11)
        rows.append(
            {
                "index": index,
                "name": "Ascend910",
                "util": round(used, 1),
                "used_mib": round(made.gauss(58_000, 500)),
                "total_mib": 65_536,
                "power": round(made.gauss(310, 12), 1),
                "temp": 92 if sick else round(made.gauss(58, 3)),
                "health": "Warning" if sick else "OK",
            }
        )
    return {
        "time": round(now, 3),
        **{key: round(value, 3) for key, value in aggregate(rows).items()},
        "chips": rows,
    }


def play(
    run: RunDirectory, seconds: float, *, nodes: int, chips: int, step_seconds: float, chip_seconds: float
) -> None:
    """Write what the run would write, for so many seconds; node 3 falls silent after a minute.

    Ends with the process that started it.
    """
    made, parent = random.Random(0), os.getppid()
    run.write_status(pid=os.getpid(), host=socket.gethostname(), job=f"{socket.gethostname()}:{os.getpid()}")
    step, began = int(run.status["step"]), time.monotonic()
    due = {node: chip_seconds * node / nodes for node in range(nodes)}
    next_step = next_beat = 0.0
    while (elapsed := time.monotonic() - began) < seconds and os.getppid() == parent:
        if elapsed >= next_step:
            step, next_step = step + 1, next_step + step_seconds
            _write_step(run, step)
        if elapsed >= next_beat:
            run.write_status(step=step)
            next_beat = elapsed + 5.0
        for node, at in due.items():
            if elapsed >= at:
                due[node] = max(at + chip_seconds, elapsed)
                if node != 3 or elapsed < 60:
                    jsonl.append(chip_log.node_file(run.path, node), sample(node, chips, time.time(), made))
        time.sleep(max(0.0, min(min(due.values()), next_step) - (time.monotonic() - began)))


def _write_step(run: RunDirectory, step: int) -> None:
    row = metrics(step, time.time())
    run.append("metrics.jsonl", row)
    with (run.logs / "rank-0.log").open("a", encoding="utf-8") as log:
        log.write(f"step {step}: loss {row['train/loss']:.4f}, {row['perf/tokens_per_s']:,.0f} tokens/s\n")
    if step % 20 == 0:
        answer = "A stand-in for an answer of the model: " + "word " * 40
        run.append(
            "samples.jsonl", {"step": step, "prompt": "A question?", "completion": answer, "reward": 1.0}
        )
    if step % 50 == 0:
        with (run.logs / "node-7.log").open("a", encoding="utf-8") as log:
            log.write(f"[ERROR] a stand-in for an error on a node, step {step}\n")


if __name__ == "__main__":
    given = dict(word.split("=") for word in sys.argv[2:])
    counts = {key: int(given[key]) for key in ("nodes", "chips")}
    pauses = {key: float(given[key]) for key in ("step_seconds", "chip_seconds")}
    play(RunDirectory(sys.argv[1]), float(given["seconds"]), **counts, **pauses)
