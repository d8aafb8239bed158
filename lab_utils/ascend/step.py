"""The real engine on device npu, with tensors that have no contents: whole steps of a small model.

ColossalAI's own NPU accelerator, our ``Npu``, the plugin, the optimizer and the loop's own methods, as a run calls
them; a fake process group stands for the other ranks. To be run in a child process that has imported torch_npu.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from lab_utils.accelerators.npu import Npu
from lab_utils.ascend.fake import Seen, fake
from lab_utils.engine.control import Stop
from lab_utils.engine.engine import Engine
from lab_utils.engine.parts import Parts
from lab_utils.engine.trial import build_trial, trial_recipe
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory


def recipe(**changes: Any) -> Recipe:
    """The model ``tiny`` in bf16 with every training signal, on rows of two documents."""
    return trial_recipe("preset:tiny", {"model.dtype": "bfloat16", "schedule.micro_rows": 2, **changes})


def steps(recipe: Recipe, count: int = 1, seen: Seen = lambda *_: None) -> Engine:
    """``count`` steps of rank 0; whatever a schema, a meta function or a formula refuses is raised.

    Args:
        seen: is told of every operator of the steps, not of those that build model and optimizer.

    Returns:
        The engine after them.
    """
    watching = False

    def told(*call: Any) -> None:
        if watching:
            seen(*call)

    with _ranks(recipe.cluster.world_size), tempfile.TemporaryDirectory() as folder, fake(told):
        run = RunDirectory(Path(folder))
        run.write_status(state="created")
        engine = Engine(recipe, Npu(), run, _build)
        engine.open()
        watching = True
        for _ in range(count):
            engine.update(engine.forward_backward(engine.load(Stop.NO)))
        return engine


def without_gradient(engine: Engine) -> list[str]:
    """Parameters that no backward pass has reached since the engine was opened: the optimizer has no state of them."""
    state = engine.optimizer.optim.state
    return sorted(
        p.name for p in engine.optimizer.places if p.masters and not any(m in state for m in p.masters)
    )


def _build(*args: Any, **kwargs: Any) -> Parts:
    """The model without memory, and rows as a loader gives them: both are made as ever."""
    with _disable_current_modes():
        parts = build_trial(*args, **kwargs)
    parts.train.next_step = _as_ever(parts.train.next_step)
    parts.train.census = list  # of data that is made here, there is nothing to tell
    parts.model.to = lambda *_, **__: (
        parts.model
    )  # it is made on its device; torch can't swap fake parameters
    return parts


def _as_ever(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with _disable_current_modes():
            return function()

    return run


@contextmanager
def _ranks(world: int) -> Iterator[None]:
    """This rank among others that are not there: they say what it says."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def all_gather_object(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with patch.object(dist, "all_gather_object", all_gather_object):
            yield
    finally:
        dist.destroy_process_group()


def on_device(engine: Engine) -> list[str]:
    """Names of parameters, gradients and optimizer states that are not on an NPU."""
    tensors = dict(engine.parts.model.named_parameters())
    tensors |= {f"gradients of bucket {i}": b.gradients for i, b in enumerate(engine.optimizer.buckets)}
    for place in engine.optimizer.places:
        for master in place.masters:
            states = engine.optimizer.optim.state.get(master, {})
            tensors |= {
                f"{key} of {place.name}": x
                for key, x in states.items()
                if isinstance(x, torch.Tensor) and x.ndim
            }
    return sorted(name for name, x in tensors.items() if x.device.type != "npu")
