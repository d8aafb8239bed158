"""How a DeepSeek-V4 is cut over ranks, in Shardformer's terms. Imported by the engine alone, after ColossalAI.

A model that was made without memory (on the meta device) is filled here, after the cut, so that a rank reads no byte
but its own. The optimizer is built after that: a parameter replaced under an optimizer would stay frozen (a defect of
``booster/plugin/hybrid_parallel_plugin.py``, ``reinitialize_optimizer``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from colossalai.shardformer.policies.base_policy import ModulePolicyDescription, Policy
from colossalai.tensor.moe_tensor.api import set_moe_tensor_ep_group
from torch import nn

from lab_utils.models.deepseek_v4.counting import split_layers
from lab_utils.models.deepseek_v4.expert_parallel import shard_experts
from lab_utils.models.deepseek_v4.model import DeepseekV4
from lab_utils.models.deepseek_v4.moe import Experts
from lab_utils.models.deepseek_v4.pipeline import Stage, held_modules, stage_forward


class DeepseekV4Policy(Policy):
    """Experts over the ep group, layers over the stages of the pipeline; the rest whole on every rank of a stage."""

    def config_sanity_check(self) -> None: ...

    def preprocess(self) -> nn.Module:
        stages = self.pipeline_stage_manager
        if stages is not None:
            parts = stages.num_stages * stages.num_model_chunks
            counts = split_layers(self.model.config, parts, mtp=bool(self.model.trained_mtp))
            found = stages.get_stage_index(counts)
            ranges = found if stages.is_interleave else [found]
            self.model.stage = Stage(
                [(int(start), int(stop)) for start, stop in ranges],
                number=stages.stage,
                group=stages.pg_mesh.get_group_along_axis(stages.pipeline_axis),
            )
            stages.stage_indices = self.model.stage.ranges
            if len(self.model.mtp):
                self.model.model.embed_tokens.weight.both_ends = (
                    True  # read by the optimizer and by checkpoints
                )
        return self.model

    def module_policy(self) -> dict[Any, ModulePolicyDescription]:
        policy, group, stages = {}, self.shard_config.ep_group, self.pipeline_stage_manager
        if group is not None and dist.get_world_size(group) > 1:
            shard = partial(_shard, group=group)
            policy[Experts] = ModulePolicyDescription(param_replacement=[shard])
        if stages is not None:
            forward = partial(stage_forward, stages=stages)
            policy[DeepseekV4] = ModulePolicyDescription(
                method_replacement={"forward": lambda model, *args, **kwargs: forward(model, *args, **kwargs)}
            )
        return policy

    def get_held_layers(self) -> list[nn.Module]:
        stages = self.pipeline_stage_manager
        first, last = stages.is_first_stage(ignore_chunk=True), stages.is_last_stage(ignore_chunk=True)
        return held_modules(self.model, self.model.stage.ranges, first, last)

    def postprocess(self) -> nn.Module:
        if self.model.materialise is not None:
            self.model.materialise()
        return self.model


def _shard(experts: Experts, group: dist.ProcessGroup) -> None:
    """Leave this rank its run of the stacked weights, marked with where they stand in the whole."""
    for parameter in (experts.gate_up_proj, experts.down_proj):
        total = parameter.shape[0]
        start, stop = shard_experts(parameter, dist.get_rank(group), dist.get_world_size(group))
        parameter.data = parameter.data[start:stop].clone()
        parameter.rows = (start, total)  # read by the optimizer and by checkpoints
        set_moe_tensor_ep_group(parameter, group)
    experts.group = group


POLICY = DeepseekV4Policy
