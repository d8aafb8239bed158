"""Mixture of experts (TR §2.1): routed experts by learned top-k or by a token table, and a shared expert.

Legend: B rows, T tokens, N = B·T, D model, E experts, F expert width, k experts of a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config

from lab_utils.models.deepseek_v4.expert_parallel import exchange_experts
from lab_utils.models.deepseek_v4.layers import Context, linear, operator


class Router(nn.Module):
    """Weights in fp32; which experts: top-k of score + correction bias, or the table ``tid2eid`` of a hash layer."""

    def __init__(self, config: DeepseekV4Config, hashed: bool):
        super().__init__()
        self.hashed = hashed
        E, k = config.n_routed_experts, config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size))
        self.options = {"k": k, "scoring": config.scoring_func, "scaling": config.routed_scaling_factor}
        if hashed:
            self.register_buffer("tid2eid", torch.zeros(config.vocab_size, k, dtype=torch.long))
        else:
            self.register_buffer("e_score_correction_bias", torch.zeros(E, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # The bias moves in steps of 0.001 around balanced loads: a cast of the model to bfloat16 must not round it.
        before = None if self.hashed else self.e_score_correction_bias
        super()._apply(fn, recurse)
        if before is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = before.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_ND: Tensor, input_ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Experts ``[N, k]`` and their weights ``[N, k]`` fp32."""
        chosen = (
            {"experts_Nk": self.tid2eid[input_ids_N]}
            if self.hashed
            else {"bias_E": self.e_score_correction_bias}
        )
        return operator("routing", x_ND)(x_ND, self.weight, **self.options, **chosen)


class Experts(nn.Module):
    """Routed experts as stacked weights: ``gate_up_proj [E, 2F, D]``, ``down_proj [E, D, F]``."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))
        self.limit = config.swiglu_limit
        self.group: Any = (
            None  # of expert parallelism, set by the policy; the weights are then this rank's share
        )

    def forward(self, x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        if self.group is not None:
            weights = (self.gate_up_proj, self.down_proj)
            return exchange_experts(x_ND, experts_Nk, weights_Nk, *weights, self.limit, self.group)
        run = operator("grouped_swiglu", x_ND)
        return run(x_ND, experts_Nk, weights_Nk, self.gate_up_proj, self.down_proj, self.limit)


class SharedExpert(nn.Module):
    """The expert of every token, clamped like the others (TR §4.2.3)."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.moe_intermediate_size)
        self.up_proj = linear(config.hidden_size, config.moe_intermediate_size)
        self.down_proj = linear(config.moe_intermediate_size, config.hidden_size)
        self.limit = config.swiglu_limit

    def forward(self, x_ND: Tensor) -> Tensor:
        gate = self.gate_proj(x_ND).clamp(max=self.limit)
        return self.down_proj(F.silu(gate) * self.up_proj(x_ND).clamp(-self.limit, self.limit))


class MoE(nn.Module):
    """Routed experts plus the shared one."""

    def __init__(self, config: DeepseekV4Config, layer: int):
        super().__init__()
        self.gate = Router(config, hashed=config.mlp_layer_types[layer] == "hash_moe")
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        experts_Nk, weights_Nk = self.gate(x_ND, context.input_ids.flatten())
        return (self.experts(x_ND, experts_Nk, weights_Nk) + self.shared_experts(x_ND)).view(x_BTD.shape)
