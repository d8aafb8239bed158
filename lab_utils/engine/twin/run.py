"""One whole step of one rank: ``step_of(recipe, ranks, rank)``."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import _support
from lab_utils.engine.library import set_accelerator
from lab_utils.engine.twin.collectives import Collective, Record, summary
from lab_utils.engine.twin.device import BACKENDS, Idle
from lab_utils.engine.twin.doors import Doors, patched
from lab_utils.engine.twin.job import Job, shards_of_every_stage
from lab_utils.engine.twin.ledger import GIB, KINDS, Ledger, Peak
from lab_utils.engine.twin.replay import Replays, name_workspaces
from lab_utils.engine.twin.watch import Watch, lifting_only_on_the_host
from lab_utils.errors import LayoutError, RecipeError
from lab_utils.models.deepseek_v4 import block
from lab_utils.models.deepseek_v4.counting import layer_costs
from lab_utils.models.load import load_config
from lab_utils.recipe import Recipe


@dataclass(frozen=True)
class Twin:
    """What a step of one rank came to.

    Attributes:
        layers: ranges of the layers that the rank holds; all of them where there are no stages.
        peak: the fullest moment of the step; ``state``: bytes by kind when the step is over.
        collectives: every call in order.
        kept: bytes of activations at most, over all moments.
        flops: of matrix products as run, recomputation and masked keys included; ``flops_model``: of this rank's layers
            by the closed form, which has neither.
        read: numbers that only data decide and the host asked for, by how they were answered.
        calls: operators that ran on fake tensors; ``seconds``: how long this took.
    """

    rank: int
    ranks: int
    stage: int
    layers: tuple[tuple[int, int], ...]
    device: str
    micro_batches: int
    peak: Peak
    state: dict[str, int]
    kept: int
    collectives: tuple[Collective, ...]
    flops: int
    flops_model: float
    read: dict[str, int]
    calls: int
    seconds: float

    @property
    def peak_gib(self) -> float:
        return self.peak.bytes / GIB

    @property
    def by_kind_gib(self) -> dict[str, float]:
        return {kind: self.peak.by_kind[kind] / GIB for kind in KINDS}

    def largest(self, count: int) -> list[dict[str, Any]]:
        """The largest blocks of the peak."""
        return [
            {"gib": b.bytes / GIB, "kind": b.kind or "temporary", "what": b.what, "shape": list(b.shape)}
            for b in self.peak.blocks[:count]
        ]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; sizes in GiB."""
        return {
            "rank": self.rank,
            "ranks": self.ranks,
            "stage": self.stage,
            "layers": [list(pair) for pair in self.layers],
            "device": self.device,
            "micro_batches": self.micro_batches,
            "memory_peak_gib": self.peak_gib,
            "memory_by_kind_gib": self.by_kind_gib,
            "collectives": summary(self.collectives),
            "flops": self.flops,
            "flops_model": self.flops_model,
            "flops_difference": self.flops / self.flops_model - 1 if self.flops_model else None,
            "host_reads": self.read,
            "operators": self.calls,
            "seconds": round(self.seconds, 2),
        }


def step_of(recipe: Recipe, ranks: int, rank: int, device: str = "cpu", *, replay: bool = True) -> Twin:
    """A forward-backward-optimizer step of a rank among so many, without memory and without the others.

    Args:
        device: "cpu", or "npu" (a chip's way through the model; ``device.py``).
        replay: run layers in full once and replay them for micro-batches alike; False runs every one in full.

    Raises:
        RecipeError, LayoutError: the recipe has no step that a twin can run, or no place for this rank.
    """
    _refuse(recipe, ranks, rank, device)
    began = time.perf_counter()
    record, ledger = Record(), Ledger()
    with _fake_group(ranks, rank), ExitStack() as stack:
        job = Job(recipe, device, ranks, rank)
        where = job.accelerator.setup()
        _choose_accelerator(where)
        doors = Doors(record, ledger, BACKENDS[device], where)
        job.open()
        doors.name_groups(job.layout)
        doors.said = lambda: shards_of_every_stage(job)
        stack.enter_context(doors.open())
        watch = Watch(ledger, where)
        for context in (_own_workspaces(), lifting_only_on_the_host(), FakeTensorMode(), watch):
            stack.enter_context(context)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        job.fill()
        doors.streams = _streams(job)
        _name_state(job, ledger)
        ledger.pass_over()
        if replay:
            replays = Replays(block.Pass.run, ledger, record, watch, full=2 if device == "cpu" else 1)
            run = lambda at, *args, **kwargs: replays.run(at, *args, **kwargs)  # noqa: E731
            stack.enter_context(patched([(block.Pass, "run", run)]))
        _settle_before_backward(job, ledger)
        agreed = len(record.entries)  # as the job was built
        job.make_states()
        del record.entries[agreed:]
        ledger.pass_over()
        built, watch.flops = ledger.time, 0
        job.step()
        _name_moments(job, ledger)
        peak, state = ledger.peak(built), ledger.held()
        stage = job.layout.stage_manager
        return Twin(
            rank=rank,
            ranks=ranks,
            stage=int(stage.stage) if stage is not None else 0,
            layers=_layers(job),
            device=device,
            micro_batches=job.accumulation,
            peak=peak,
            state=state,
            kept=ledger.most("activations"),
            collectives=tuple(record.entries),
            flops=watch.flops,
            flops_model=_model_flops(job),
            read=watch.read,
            calls=watch.calls,
            seconds=time.perf_counter() - began,
        )


def _refuse(recipe: Recipe, ranks: int, rank: int, device: str) -> None:
    if device not in BACKENDS:
        raise LayoutError(f"--device {device}: a twin runs on {' or '.join(BACKENDS)}.")
    if not 0 <= rank < ranks:
        raise LayoutError(f"--rank {rank} is none of {ranks} ranks: give one from 0 to {ranks - 1}.")
    if recipe.objective.kind != "sft":
        raise RecipeError(
            f"objective.kind={recipe.objective.kind}: its rows come from samples or pairs, and a twin has none; give a "
            f"recipe with objective.kind=sft of the same model and layout."
        )
    if getattr(load_config(recipe.model.source), "model_type", None) != "deepseek_v4":
        raise RecipeError(f"model.source={recipe.model.source}: a twin knows DeepSeek-V4 models alone.")
    recipe.layout(ranks)


@contextmanager
def _fake_group(ranks: int, rank: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise LayoutError("A twin needs a process of its own: this one is a rank of a job.")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        gc.unfreeze()
        dist.destroy_process_group()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Kernels' kept scratch: none from before, and none of the fake ones left behind."""
    held = _support._buffers.__dict__
    before = dict(held)
    held.clear()
    try:
        yield
    finally:
        held.clear()
        held.update(before)


def _choose_accelerator(device: torch.device) -> None:
    set_accelerator("npu" if device.type == "npu" and "torch_npu" in sys.modules else Idle(device))


def _streams(job: Job) -> tuple[tuple[int, ...], torch.dtype]:
    """What stages hand on of one micro-batch."""
    config = job.parts.model.config
    tokens = job.recipe.data.row_tokens // job.recipe.parallel.cp
    shape = (job.micro_rows, tokens, config.hc_mult, config.hidden_size)
    return shape, getattr(torch, job.recipe.model.dtype)


def _name_state(job: Job, ledger: Ledger) -> None:
    model, optimizer = job.parts.model, job.optimizer
    for bucket in optimizer.buckets:
        names = ", ".join(place.name for place in bucket.places[:2])
        more = f", … ({len(bucket.places)})" if len(bucket.places) > 2 else ""
        ledger.name(bucket.gradients, "gradients", f"gradients of {names}{more}")
        for place in bucket.places:
            for master in place.masters:
                ledger.name(master, "masters", f"master of {place.name}")
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        ledger.name(tensor, "weights", name)  # last: an fp32 parameter is its own master


def _name_moments(job: Job, ledger: Ledger) -> None:
    for place in job.optimizer.places:
        for master in place.masters:
            for key, state in job.optimizer.optim.state.get(master, {}).items():
                if isinstance(state, torch.Tensor):
                    ledger.name(state, "moments", f"{key} of {place.name}")


def _settle_before_backward(job: Job, ledger: Ledger) -> None:
    """What is there when a backward pass begins was kept for it. After it, Python's collector takes what hangs together
    in cycles (the places of documents and the plans made of them), as it does in a run, but at times of its own."""
    gc.freeze()  # what has been built is not looked through each time
    for name in ("backward", "backward_by_grad"):
        real = getattr(job.optimizer, name)

        def settling(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            name_workspaces(ledger)
            ledger.settle()
            out = _real(*args, **kwargs)
            gc.collect()
            ledger.pass_over()
            return out

        setattr(job.optimizer, name, settling)


def _model_flops(job: Job) -> float:
    """Training FLOPs of this rank's layers by the closed form (``counting.py``), nothing made again: three times the
    forward pass's, the indexer's too where it has its loss."""
    model, recipe = job.parts.model, job.recipe
    costs, after = layer_costs(model.config, recipe.data.row_tokens, mtp=bool(model.trained_mtp))
    forward = sum(costs[i] for start, stop in _layers(job) for i in range(start, stop))
    forward += after if job.layout.last_stage else 0.0
    tokens = recipe.data.row_tokens // recipe.parallel.cp
    return 3.0 * forward * job.accumulation * job.micro_rows * tokens


def _layers(job: Job) -> tuple[tuple[int, int], ...]:
    stage = getattr(job.parts.model, "stage", None)
    return tuple(stage.ranges) if stage is not None else ((0, len(job.parts.model.model.layers)),)
