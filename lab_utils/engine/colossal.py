"""The only door to ColossalAI 0.5.0: import, start-up, plugin. What it does wrong is put right here and in ``zero.py``.

ColossalAI is finished software (its last release pins torch 2.5), so it is corrected by subclassing. Each override is
named for the defect that it answers; paths are below ``colossalai/`` in its source.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from lab_utils.accelerators import Accelerator


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Defect: ``nn/optimizer/__init__.py`` imports galore_torch and bitsandbytes whether or not GaLore is used.

    Empty classes take their place for the time of the import and go again, so that nobody else finds them.
    """
    absent = {
        "galore_torch": ("GaLoreAdafactor", "GaLoreAdamW"),
        "bitsandbytes": (),
        "bitsandbytes.optim": (),
        "bitsandbytes.optim.optimizer": ("Optimizer2State",),
    }
    added = []
    for name, classes in absent.items():
        if name.split(".")[0] in added or importlib.util.find_spec(name.split(".")[0]) is None:
            module = ModuleType(name)
            for cls in classes:
                setattr(module, cls, type(cls, (), {}))
            sys.modules[name] = module
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def _has_no_hccl() -> bool:
    return False


# Defect: pipeline/p2p.py calls torch.distributed.is_hccl_available, which only torch_npu defines.
if not hasattr(dist, "is_hccl_available"):
    dist.is_hccl_available = _has_no_hccl

with _stand_ins(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # apex, tensornvme and flash-attention are absent on purpose
    import colossalai
    from colossalai.accelerator import CpuAccelerator, set_accelerator
    from colossalai.booster import Booster
    from colossalai.booster.plugin import MoeHybridParallelPlugin
    from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule, get_param_info
    from colossalai.shardformer.policies.base_policy import Policy

from lab_utils.engine.placement import Sharding  # noqa: E402  (these need the import above to have happened)
from lab_utils.engine.zero import Groups, ZeroOptimizer  # noqa: E402


class IdleStream:
    """A CPU has one queue: waiting for it is done before it is asked."""

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


class CompleteCpu(CpuAccelerator):
    """Defect: ``accelerator/cpu_accelerator.py`` raises where ZeRO and the plugins ask (streams, device, memory)."""

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def Stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> IdleStream:
        return IdleStream()

    def Event(self, *args: Any, **kwargs: Any) -> IdleStream:
        return IdleStream()

    def current_stream(self, device: Any = None) -> IdleStream:
        return IdleStream()

    def default_stream(self, device: Any = None) -> IdleStream:
        return IdleStream()

    def stream(self, stream_: Any) -> nullcontext:
        return nullcontext()

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    def max_memory_allocated(self, device: Any = None) -> int:
        return 0

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """Defect: hands its device on to a torch function that takes no argument."""
        return torch.get_rng_state()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)


class WholeModelPolicy(Policy):
    """Shardformer's rules for a model that every rank holds whole: nothing is replaced.

    Defect: the automatic policies import names that transformers 5 no longer has, and none knows DeepSeek-V4.
    """

    def config_sanity_check(self) -> None: ...

    def preprocess(self) -> torch.nn.Module:
        return self.model

    def module_policy(self) -> dict[Any, Any]:
        return {}

    def postprocess(self) -> torch.nn.Module:
        return self.model


class LayoutPlugin(MoeHybridParallelPlugin):
    """Data and expert parallelism with ZeRO stage 0 or 1 on every device kind.

    - Defect: ``precision="bf16"`` casts *all* parameters, buffers and float inputs of forward (the router's weight and
      bias, sinks, loss weights). The model comes with the dtypes it wants; the wrapper is told "fp32", which casts
      nothing.
    - Defect: ZeRO refuses fp32, and stage 0 goes through DDP, which refuses experts and hangs on a parameter without a
      gradient. Both stages use ``ZeroOptimizer``: stage 0 is one shard and a gradient sum over the ranks.
    - Defect: ``max_norm`` clips by a norm that is wrong with experts or an empty group: it stays 0, the engine clips.
    - Defect: a model without experts is refused ("No parameters found in moe_dp_group"): here it has none to cut.

    Attributes:
        dp_rank, dp_size: this rank's place among those that see different tokens.
    """

    def __init__(self, *, ep: int, zero: int, bucket_elements: int) -> None:
        super().__init__(
            tp_size=1,
            pp_size=1,
            ep_size=ep,
            precision="fp32",
            zero_stage=zero,
            max_norm=0.0,
            overlap_communication=False,
        )
        self.bucket_elements = bucket_elements
        self.dp_rank = dist.get_rank(self.dp_group)

    @property
    def cuts_model(self) -> bool:
        """Whether a rank holds less than the whole model."""
        return self.ep_size > 1

    def writes(self, tensor: torch.Tensor) -> bool:
        """Whether this rank is the one to save a tensor of its model, among those that hold the same rows of it."""
        group = self.moe_dp_group if hasattr(tensor, "ep_group") else self.dp_group
        return dist.get_rank(group) == 0

    def supported_devices(self) -> list[str]:
        return ["cpu", "cuda", "npu"]

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        param_info = get_param_info(optimizer)
        wrapped = HybridParallelModule(
            model,
            precision="fp32",
            shard_config=self.shard_config,
            dp_group=self.dp_group,
            tp_group=self.tp_group,
            sp_group=self.sp_group,
            use_ddp=False,
            ddp_config=self.ddp_config,
            custom_policy=policy_of(model),
        )
        if optimizer is not None:
            optimizer = ZeroOptimizer(
                optimizer,
                wrapped,
                param_info=param_info,
                names=global_names(model),
                groups=self._groups(),
                bucket_elements=self.bucket_elements,
            )
        return wrapped, optimizer, criterion, dataloader, lr_scheduler

    def _groups(self) -> Groups:
        # With tensor parallelism of 1 that group holds this rank alone: one shard, the whole of it.
        def sharding(group: dist.ProcessGroup) -> Sharding:
            return Sharding(group, group if self.zero_stage else self.tp_group)

        return Groups(sharding(self.dp_group), sharding(self.moe_dp_group), self.dp_group)

    def __del__(self) -> None:
        """Defect: the parent destroys process groups at interpreter exit, when torch is half gone: a TypeError."""


def policy_of(model: torch.nn.Module) -> Policy:
    """How a model is cut: ``POLICY`` of the module ``policy`` beside it, else whole on every rank."""
    package = type(model).__module__.rpartition(".")[0]
    if not package or importlib.util.find_spec(f"{package}.policy") is None:
        return WholeModelPolicy()
    return importlib.import_module(f"{package}.policy").POLICY()


def global_names(model: torch.nn.Module) -> dict[int, str]:
    """Name of each parameter as checkpoints have it, by id: the first in the state dict, which knows tied weights."""
    names: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.nn.Parameter):
            names.setdefault(id(value), name)
    return names


def start(accelerator: Accelerator, seed: int) -> tuple[int, int]:
    """Join the process group of torchrun's environment, or make one of a single rank; returns (rank, world size)."""
    set_accelerator(CompleteCpu() if accelerator.name == "cpu" else accelerator.name)
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            alone = {
                "RANK": 0,
                "LOCAL_RANK": 0,
                "WORLD_SIZE": 1,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": _free_port(),
            }
            os.environ.update({key: str(value) for key, value in alone.items()})
        colossalai.launch_from_torch(seed=seed % 2**32, verbose=False)
    return dist.get_rank(), dist.get_world_size()


def plugin(*, ep: int, zero: int, bucket_elements: int = 12 * 2**20) -> LayoutPlugin:
    """The layout of this job; made before the model, since a rank's place in it decides what data it reads."""
    return LayoutPlugin(ep=ep, zero=zero, bucket_elements=bucket_elements)


def boost(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, layout: LayoutPlugin
) -> tuple[Booster, torch.nn.Module, ZeroOptimizer]:
    """Cut and wrap model and optimizer for training: ``(booster, model, optimizer)``."""
    booster = Booster(plugin=layout)
    model, optimizer, *_ = booster.boost(model, optimizer)
    return booster, model, optimizer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
