"""How a DeepSeek-V4 is cut over ranks, in Shardformer's terms. Imported by the engine alone, after ColossalAI.

Every parameter keeps its object, only ``.data`` is replaced: the optimizer was built on these objects, and a new one
would stay frozen (a defect of ``booster/plugin/hybrid_parallel_plugin.py``, ``reinitialize_optimizer``).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from colossalai.shardformer.policies.base_policy import ModulePolicyDescription, Policy
from colossalai.tensor.moe_tensor.api import set_moe_tensor_ep_group
from torch import nn

from lab_utils.models.deepseek_v4.expert_parallel import shard_experts
from lab_utils.models.deepseek_v4.moe import Experts


class DeepseekV4Policy(Policy):
    """Experts over the ep group; everything else whole on every rank."""

    def config_sanity_check(self) -> None: ...

    def preprocess(self) -> nn.Module:
        return self.model

    def module_policy(self) -> dict[Any, ModulePolicyDescription]:
        group = self.shard_config.ep_group
        if group is None or dist.get_world_size(group) == 1:
            return {}
        return {Experts: ModulePolicyDescription(param_replacement=[lambda module: _shard(module, group)])}

    def postprocess(self) -> nn.Module:
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
