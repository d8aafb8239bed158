"""Speed, traffic and memory of a layout; a worker of ``lab bench layout`` and ``lab bench plan``.

``torchrun … -m lab_utils.engine.bench options.json``
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from lab_utils.accelerators import get_accelerator
from lab_utils.data.rows import PackedRows
from lab_utils.engine import colossal
from lab_utils.engine.control import Stop
from lab_utils.engine.engine import Engine
from lab_utils.engine.parts import Parts, model_of
from lab_utils.engine.reduce import gather_objects
from lab_utils.engine.traffic import counted
from lab_utils.objectives.sft import Sft
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory


class RandomRows:
    """Rows of one document each of random tokens, all of them with loss."""

    epoch = 0.0

    def __init__(self, rows: int, tokens: int, vocabulary: int, rank: int, world: int) -> None:
        self.shape, self.vocabulary = (rows // world, tokens), vocabulary
        self.generator = torch.Generator().manual_seed(rank)

    def next_step(self) -> PackedRows:
        B, T = self.shape
        ids = torch.randint(0, self.vocabulary, (B, T), generator=self.generator)
        weights = torch.ones(B, T)
        weights[:, 0] = 0
        return PackedRows(ids, torch.arange(T).repeat(B, 1), torch.zeros(B, T, dtype=torch.long), weights)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """``tokens_per_s`` of all ranks; ``bytes_sent_per_rank`` in a step, ``peak_mib``, and
    ``resident_mib`` before there is a model: the largest rank's.

    With ``follow`` no times: ``tensors_mib``, of the tensors alive at the fullest moment of a step on the fullest rank.
    """
    recipe = Recipe.parse(options["recipe"])
    accelerator = get_accelerator(recipe.cluster.accelerator)
    colossal.start(accelerator, 0)
    resident = psutil.Process().memory_info().rss / 2**20
    engine = _engine(recipe, accelerator, Path(options["folder"]))
    if options.get("follow"):
        return {"tensors_mib": max(gather_objects(_followed(engine))) / 2**20}
    engine.open()
    accelerator.reset_memory_peak()
    times, sent = [], 0
    for step in range(options["warmup"] + options["steps"]):
        with counted() as traffic:
            seconds = _step(engine)
        if step >= options["warmup"]:
            times.append(seconds)
            sent = max(sent, sum(traffic.values()))
    found = gather_objects((sent, accelerator.memory().allocated_peak / 2**20, resident))
    return {
        "tokens_per_s": recipe.schedule.batch_tokens / statistics.median_high(times),
        "bytes_sent_per_rank": max(each[0] for each in found),
        "peak_mib": max(each[1] for each in found),
        "resident_mib": max(each[2] for each in found),
    }


def side_by_side(options: dict[str, Any]) -> dict[str, Any]:
    """``seconds`` of a step of each of ``recipes``, in one job: a step of one, then of the next, so that what a shared
    machine's other users take is taken from all alike."""
    recipes = [Recipe.parse(tree) for tree in options["recipes"]]
    accelerator = get_accelerator(recipes[0].cluster.accelerator)
    colossal.start(accelerator, 0)
    engines = []
    for number, recipe in enumerate(recipes):
        engines.append(_engine(recipe, accelerator, Path(options["folder"]) / str(number)))
        engines[-1].open()
    times = [[_step(engine) for engine in engines] for _ in range(options["warmup"] + options["steps"])]
    return {"seconds": [statistics.median(each) for each in zip(*times[options["warmup"] :], strict=True)]}


def _engine(recipe: Recipe, accelerator: Any, folder: Path) -> Engine:
    """An engine of the recipe on random rows, not open yet."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        RunDirectory(folder).write_status(state="created")
    dist.barrier()

    def build(
        recipe: Recipe, accelerator: Any, run_dir: Any, *, rank: int, world: int, device: Any, source: Any
    ) -> Parts:
        model = model_of(recipe, device=device, defer=True)
        vocabulary = model.config.vocab_size
        train = RandomRows(recipe.rows_per_step, recipe.data.row_tokens, vocabulary, rank, world)
        return Parts(model=model, train=train, objective=Sft(), write_config=lambda folder: None)

    return Engine(recipe, accelerator, RunDirectory(folder), build)


def _step(engine: Engine) -> float:
    """Seconds of a step of all ranks."""
    dist.barrier()
    start = time.perf_counter()
    engine.update(engine.forward_backward(engine.load(Stop.NO)))
    engine.accelerator.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def _followed(engine: Engine) -> int:
    """Bytes of the tensors alive at the peak of a step like any but a run's first."""
    from lab_utils.engine.twin.follow import Following
    from lab_utils.engine.twin.ledger import Ledger

    ledger = Ledger()
    with Following(ledger):
        engine.open()
        engine.update(engine.forward_backward(engine.load(Stop.NO)))
        start = ledger.time
        engine.update(engine.forward_backward(engine.load(Stop.NO)))
    return ledger.peak(start).bytes


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    row = side_by_side(settings) if "recipes" in settings else measure(settings)
    if dist.get_rank() == 0:
        (Path(settings["folder"]) / "row.json").write_text(json.dumps(row))
    colossal.leave()
