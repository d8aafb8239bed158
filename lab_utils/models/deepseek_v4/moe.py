"""Mixture of experts (TR §2.1): routed experts by learned top-k or by a token table, and a shared expert.

Legend: B rows, T tokens, N = B·T, D model, E experts, F expert width, k experts of a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config

from lab_utils.models.deepseek_v4.balance import sequence_balance
from lab_utils.models.deepseek_v4.expert_parallel import Beside, exchange_experts
from lab_utils.models.deepseek_v4.layers import Context, linear, operator


class Routed(NamedTuple):
    """What a router says of some tokens."""

    experts_Nk: Tensor
    weights_Nk: Tensor  # fp32
    balance: Tensor | None  # the sequence balance loss, a sum over documents, where it is wanted


class Router(nn.Module):
    """Weights in fp32; which experts: top-k of score + correction bias, or the table ``tid2eid`` of a hash layer.

    ``load_E`` counts the tokens of each expert since the last optimizer step, in layers that choose.
    """

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
            self.register_buffer("load_E", torch.zeros(E, dtype=torch.long), persistent=False)

    def _apply(self, fn, recurse=True):
        # The bias moves in steps of 0.001 around balanced loads: a cast of the model to bfloat16 must not round it.
        before = None if self.hashed else self.e_score_correction_bias
        super()._apply(fn, recurse)
        if before is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = before.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_ND: Tensor, context: Context, given_Nk: Tensor | None = None) -> Routed:
        """Experts of each token and their weights. ``given_Nk``: experts to take, whatever the layer would choose."""
        if given_Nk is not None:
            chosen = {"experts_Nk": given_Nk.long()}
        elif self.hashed:
            chosen = {"experts_Nk": self.tid2eid[context.input_ids.flatten()]}
        else:
            chosen = {"bias_E": self.e_score_correction_bias}
        wanted = context.balance and not self.hashed
        run = operator("routing", x_ND)
        experts_Nk, weights_Nk, *scores = run(x_ND, self.weight, **self.options, **chosen, want_scores=wanted)
        balance = sequence_balance(scores[0], experts_Nk, context) if wanted else None
        return Routed(experts_Nk, weights_Nk, balance)

    @torch.no_grad()
    def count(self, experts_Nk: Tensor, context: Context) -> None:
        """Add the tokens of a forward pass to ``load_E``; a hash layer, which cannot be balanced, counts none."""
        if self.hashed:
            return
        E = len(self.load_E)
        slots = torch.where(context.counted_BT.flatten()[:, None], experts_Nk, E).flatten()
        found = torch.zeros(E + 1, dtype=torch.long, device=slots.device)
        self.load_E += found.scatter_add_(0, slots, torch.ones_like(slots))[:E]


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
        # Past the last layer, in an MTP block, routing is learned.
        hashed = layer < config.num_hidden_layers and config.mlp_layer_types[layer] == "hash_moe"
        self.gate = Router(config, hashed=hashed)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(
        self, x_BTD: Tensor, context: Context, given_Nk: Tensor | None = None
    ) -> tuple[Tensor, Routed]:
        """``[B, T, D]``, and how it was routed."""
        x_ND = x_BTD.flatten(0, 1)
        routed = self.gate(x_ND, context, given_Nk)
        experts_Nk, weights_Nk, _ = routed
        # While tokens travel to their experts and back, a device computes the expert that stays at home.
        beside = Beside(x_ND.device, wanted=self.experts.group is not None)
        shared_ND = beside.run(self.shared_experts, x_ND)
        y_ND = self.experts(x_ND, experts_Nk, weights_Nk)
        return (y_ND + beside.wait(shared_ND)).view(x_BTD.shape), routed
