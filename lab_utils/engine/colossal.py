"""The only door to ColossalAI 0.5.0: start-up, plugin. What it does wrong is put right here, in ``library.py``,
``cpu.py`` and ``zero.py``.

ColossalAI is finished software (its last release pins torch 2.5), so it is corrected by subclassing. Each override is
named for the defect that it answers; paths are below ``colossalai/`` in its source.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lab_utils.accelerators import Accelerator
from lab_utils.engine.cpu import CompleteCpu
from lab_utils.engine.handed_on import let_go
from lab_utils.engine.library import (
    Booster,
    HybridParallelModule,
    MoeHybridParallelPlugin,
    Policy,
    ShardFormer,
    colossalai,
    get_param_info,
    set_accelerator,
)
from lab_utils.engine.placement import Sharding
from lab_utils.engine.reduce import gather_objects
from lab_utils.engine.zero import Groups, ZeroOptimizer
from lab_utils.errors import RecipeError
from lab_utils.models.context_parallel import ContextParallel
from lab_utils.optim.dealing import even_shards
from lab_utils.optim.groups import matrices
from lab_utils.recipe import ParallelSection


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
    """Data, context, expert and pipeline parallelism with ZeRO stage 0 or 1 on every device kind.

    Ranks that share a row are neighbours among the data-parallel ones: to weights, gradients and experts they are ranks
    with different tokens, like all others.

    - Defect: ``precision="bf16"`` casts *all* parameters, buffers and float inputs of forward (the router's weight and
      bias, sinks, loss weights). The model comes with the dtypes it wants; the wrapper is told "fp32", which casts
      nothing.
    - Defect: ZeRO refuses fp32, and stage 0 goes through DDP, which refuses experts and hangs on a parameter without a
      gradient. Both stages use ``ZeroOptimizer``: stage 0 is one shard and a gradient sum over the ranks.
    - Defect: ``max_norm`` clips by a norm that is wrong with experts or an empty group: it stays 0, the engine clips.
    - Defect: ``overlap_p2p`` starts messages of both directions at once; between two stages that are each other's
      next and previous they meet in another order on either side, and the interleaved schedule hangs: it stays off.
    - Defect: a model without experts is refused ("No parameters found in moe_dp_group"): here it has none to cut.

    Attributes:
        dp_rank, dp_size: this rank's place among those that see different tokens.
        parts: among those that share rows; None where nobody does.
        data_rank: the place of its rows in a batch, of ``dp_size / cp``.
    """

    def __init__(
        self,
        *,
        cp: int,
        ep: int,
        pp: int,
        virtual_stages: int,
        micro_rows: int,
        zero: int,
        offload: bool,
        bucket_elements: int,
    ) -> None:
        super().__init__(
            tp_size=1,
            pp_size=pp,
            ep_size=ep,
            pp_style="interleaved" if virtual_stages > 1 else "1f1b",
            num_model_chunks=virtual_stages,
            microbatch_size=micro_rows,
            overlap_p2p=False,
            precision="fp32",
            zero_stage=zero,
            max_norm=0.0,
            overlap_communication=False,
        )
        if pp > 1:
            let_go(self.scheduler)
        self.bucket_elements, self.offload = bucket_elements, offload
        self.dp_rank = dist.get_rank(self.dp_group)
        self.parts = ContextParallel.of(self._runs(False, cp)) if cp > 1 else None
        self.data_rank = self.dp_rank // cp
        # Of parameters that the first and the last stage both hold: the ranks of both, None in the stages between.
        ends = [range(self.moe_dp_size), sorted({0, pp - 1}), range(ep)]
        axes = [self.moe_dp_axis, self.pp_axis, self.ep_axis]
        self.ends_group = self.pg_mesh.create_group_along_axis(axes, [list(indices) for indices in ends])

    @property
    def cuts_model(self) -> bool:
        """Whether a rank holds less than the whole model."""
        return self.ep_size > 1 or self.pp_size > 1

    @property
    def first_stage(self) -> bool:
        return self.stage_manager is None or self.stage_manager.is_first_stage(ignore_chunk=True)

    @property
    def last_stage(self) -> bool:
        return self.stage_manager is None or self.stage_manager.is_last_stage(ignore_chunk=True)

    @property
    def tells_rows(self) -> bool:
        """Whether this rank is the one to count its rows, of those that have them."""
        return self.first_stage and (self.parts is None or self.parts.rank == 0)

    def run_pipeline(self, batch: dict[str, Any], model: Any, criterion: Any, optimizer: Any = None) -> None:
        """One global batch of this rank through the stages; without an optimizer, forward only.

        Defect: a schedule that has run forward only keeps the number of micro-batches and the shapes of that batch, and
        refuses the next training step: here every batch starts it anew.
        """
        schedule = self.scheduler
        for name in ("num_microbatches", "num_microbatch"):
            if hasattr(schedule, name):
                setattr(schedule, name, None)
        schedule.last_batch_size = None
        schedule.send_tensor_metadata = schedule.send_grad_metadata = schedule.enable_metadata_cache = True
        schedule.tensor_metadata_recv = schedule.grad_metadata_recv = None
        if optimizer is None:
            schedule.forward_backward_step(model, iter([batch]), criterion)
        else:
            self.execute_pipeline(iter([batch]), model, criterion, optimizer, return_loss=False)

    def writes(self, tensor: torch.Tensor) -> bool:
        """Whether this rank is the one to save a tensor of its model, among those that hold the same rows of it."""
        return dist.get_rank(self._groups().of(tensor).reduce_group) == 0

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor summed in place over the ranks that see different tokens in the same stage."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def supported_devices(self) -> list[str]:
        return ["cpu", "cuda", "npu"]

    def cut(self, model: torch.nn.Module) -> None:
        """Leave a model what this rank holds of it, as ``configure`` does; nothing is wrapped."""
        self._share_rows(model)
        ShardFormer(self.shard_config).optimize(model, policy=policy_of(model))

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        """``optimizer`` makes one. Defect: the parent takes an optimizer that was built on the whole model, and freezes
        what the policy replaces under it; here it is made when the model has been cut and filled.

        Raises:
            RecipeError: rows are cut over ranks, and the model can't work on a part of them.
        """
        self._share_rows(model)
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
            made = optimizer()
            optimizer = ZeroOptimizer(
                made,
                wrapped,
                param_info=get_param_info(made),
                names=global_names(model),
                groups=self._groups(*self._shards_of_matrices(made, model)),
                bucket_elements=self.bucket_elements,
                offload=self.offload,
            )
        return wrapped, optimizer, criterion, dataloader, lr_scheduler

    def _share_rows(self, model: torch.nn.Module) -> None:
        if self.parts is None:
            return
        if not hasattr(model, "parts"):
            raise RecipeError(
                f"parallel.cp={self.parts.ranks}: only DeepSeek-V4 models work on a part of a row, and this is a "
                f"{type(model).__name__}: set parallel.cp to 1."
            )
        model.parts = self.parts

    def _shards_of_matrices(
        self, optimizer: torch.optim.Optimizer, model: torch.nn.Module
    ) -> tuple[int, int]:
        """Over how many ranks Muon's matrices are dealt out, dense ones and experts; the same in all stages."""
        sizes: tuple[list[int], list[int]] = ([], [])
        for group in optimizer.param_groups:
            if group.get("algorithm") == "muon":
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    views = matrices(name, tuple(parameter.shape), getattr(model, "config", None))
                    sizes[hasattr(parameter, "ep_group")].extend(view.size for view in views or [])
        counts = (self.dp_size, self.moe_dp_size)
        found = gather_objects([even_shards(each, ranks) for each, ranks in zip(sizes, counts, strict=True)])
        dense, experts = (min(column) for column in zip(*found, strict=True))
        return dense, experts

    def _runs(self, experts: bool, length: int) -> dist.ProcessGroup:
        """This rank's group of so many of the ranks that hold the same parameters; every rank makes every group."""
        held: dict[tuple[int, ...], list[int]] = {}
        for rank in range(dist.get_world_size()):
            coordinate = self.pg_mesh.unravel(rank, self.pg_mesh.shape)
            alike = (int(coordinate[self.pp_axis]), int(coordinate[self.ep_axis]) if experts else 0)
            held.setdefault(alike, []).append(rank)
        mine = None
        for ranks in held.values():
            for start in range(0, len(ranks), length):
                group = self.pg_mesh._get_group(ranks[start : start + length])
                mine = group if dist.get_rank() in ranks[start : start + length] else mine
        return mine

    def _groups(self, dense: int | None = None, experts: int | None = None) -> Groups:
        """``dense``, ``experts``: over how many ranks whole matrices are cut; absent: as other parameters are."""

        # With tensor parallelism of 1 that group holds this rank alone: one shard, the whole of it.
        def sharding(group: dist.ProcessGroup) -> Sharding:
            return Sharding(group, group if self.zero_stage else self.tp_group)

        def whole(group: dist.ProcessGroup, shards: int | None, of_experts: bool) -> Sharding:
            if not self.zero_stage or shards in (None, dist.get_world_size(group)):
                return sharding(group)
            return Sharding(group, self.tp_group if shards == 1 else self._runs(of_experts, shards))

        ends = sharding(self.ends_group) if self.pp_size > 1 and self.ends_group else sharding(self.dp_group)
        return Groups(
            sharding(self.dp_group),
            sharding(self.moe_dp_group),
            ends,
            whole(self.dp_group, dense, False),
            whole(self.moe_dp_group, experts, True),
            self.dp_group,
        )

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


def leave() -> None:
    """End this process, all ranks together: gloo's threads may abort an interpreter that winds itself up."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def plugin(parallel: ParallelSection, micro_rows: int, bucket_elements: int = 12 * 2**20) -> LayoutPlugin:
    """The layout of this job; made before the model, since a rank's place in it decides what data it reads."""
    return LayoutPlugin(
        cp=parallel.cp,
        ep=parallel.ep,
        pp=parallel.pp,
        virtual_stages=parallel.virtual_stages,
        micro_rows=micro_rows,
        zero=parallel.zero,
        offload=parallel.offload,
        bucket_elements=bucket_elements,
    )


def boost(
    model: torch.nn.Module, make_optimizer: Callable[[], torch.optim.Optimizer], layout: LayoutPlugin
) -> tuple[Booster, torch.nn.Module, ZeroOptimizer]:
    """Cut, fill and wrap a model for training, and make its optimizer: ``(booster, model, optimizer)``."""
    booster = Booster(plugin=layout)
    model, optimizer, *_ = booster.boost(model, make_optimizer)
    return booster, model, optimizer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
