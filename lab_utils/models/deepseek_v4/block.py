"""One transformer block: attention and MoE, each inside its own hyper-connection (TR §2.2).

What a block keeps for its backward pass, in numbers a token beside what attention and experts keep themselves (D model,
4 streams): ``none`` 14 D, the streams before attention and before the experts, and input, normed input and output of
both. ``mhc`` 8 D: the streams before the experts are made again from those before attention. ``attention``: as none,
and attention is made again from its input. ``full``: 4 D, the block's input, and everything is made again.

Legend: B rows, T tokens, N = B·T, n streams, D model, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV4Config

from lab_utils.models.base import RoutingRecord
from lab_utils.models.deepseek_v4.attention import Attention
from lab_utils.models.deepseek_v4.hyper_connections import HyperConnection
from lab_utils.models.deepseek_v4.layers import Context, Norm
from lab_utils.models.deepseek_v4.moe import MoE


class BlockOutput(NamedTuple):
    """What a block leaves. Outputs, not side effects: a recomputation in the backward pass must leave nothing twice."""

    h_BTnD: Tensor
    indexer_kl: tuple[Tensor, Tensor] | None  # the indexer's KL, a sum, and the queries it is over
    balance: Tensor | None  # the sequence balance loss, a sum over documents
    experts_Nk: Tensor


class Layer(nn.Module):
    """Layer number ``layer`` of a configuration; those past the last are the blocks of multi-token prediction."""

    def __init__(self, config: DeepseekV4Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MoE(config, layer)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.attn_hc = HyperConnection(config)
        self.ffn_hc = HyperConnection(config)

    def forward(
        self, h_BTnD: Tensor, context: Context, given_Nk: Tensor | None = None, again: str = "none"
    ) -> BlockOutput:
        """The streams after the block.

        Args:
            given_Nk: experts to take in place of the router's own choice.
            again: what is made again in the backward pass instead of kept: "none", "mhc" or "attention".
        """
        if again == "mhc":
            return self._with_streams_again(h_BTnD, context, given_Nk)
        x_BTD, kept = self.attn_hc.collapse(h_BTnD)
        x_BTD = self.input_layernorm(x_BTD)
        attend = _again(self.self_attn) if again == "attention" else self.self_attn
        y_BTD, kl = attend(x_BTD, context)
        h_BTnD = self.attn_hc.expand(y_BTD, kept)
        x_BTD, kept = self.ffn_hc.collapse(h_BTnD)
        y_BTD, routed = self.mlp(self.post_attention_layernorm(x_BTD), context, given_Nk)
        return BlockOutput(self.ffn_hc.expand(y_BTD, kept), kl, routed.balance, routed.experts_Nk)

    def _with_streams_again(self, h_BTnD: Tensor, context: Context, given_Nk: Tensor | None) -> BlockOutput:
        y_attn, kl = self.self_attn(_again(self._into_attention)(h_BTnD), context)
        y_ffn, routed = self.mlp(_again(self._into_experts)(h_BTnD, y_attn), context, given_Nk)
        return BlockOutput(_again(self._out)(h_BTnD, y_attn, y_ffn), kl, routed.balance, routed.experts_Nk)

    def _into_attention(self, h_BTnD: Tensor) -> Tensor:
        return self.input_layernorm(self.attn_hc.collapse(h_BTnD)[0])

    def _between(self, h_BTnD: Tensor, y_attn: Tensor) -> Tensor:
        return self.attn_hc.expand(y_attn, self.attn_hc.collapse(h_BTnD)[1])

    def _into_experts(self, h_BTnD: Tensor, y_attn: Tensor) -> Tensor:
        x_BTD, _ = self.ffn_hc.collapse(self._between(h_BTnD, y_attn))
        return self.post_attention_layernorm(x_BTD)

    def _out(self, h_BTnD: Tensor, y_attn: Tensor, y_ffn: Tensor) -> Tensor:
        return self.ffn_hc.expand(y_ffn, self.ffn_hc.collapse(self._between(h_BTnD, y_attn))[1])


def _again(function: Callable) -> Callable:
    """The function, run again in the backward pass instead of keeping what it needs there."""
    return partial(checkpoint, function, use_reentrant=False)


@dataclass
class Pass:
    """A forward pass on its way through blocks: runs them, and keeps what they leave beside the streams."""

    context: Context
    again: str  # what of a block is made again in the backward pass: "none", "mhc", "attention", "full"
    count: bool  # whether tokens add to the experts' load
    given: list[Tensor]  # experts to take, by block; those after the list's end choose for themselves
    record: RoutingRecord | None
    indexer_kl: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    balance: list[Tensor] = field(default_factory=list)

    def run(self, block: Layer, number: int, *inputs: Tensor, context: Context | None = None) -> Tensor:
        """The streams after block ``number`` of the model; ``context``: the block's own, where it has one."""
        context = context or self.context
        given_Nk = self.given[number] if number < len(self.given) else None
        if self.again == "full":
            out = _again(block)(*inputs, context, given_Nk)
        else:
            out = block(*inputs, context, given_Nk, self.again)
        if out.indexer_kl is not None:
            self.indexer_kl.append(out.indexer_kl)
        if out.balance is not None:
            self.balance.append(out.balance)
        # Here and not in the router: a recomputation runs the block again, but not this.
        if self.count:
            block.mlp.gate.count(out.experts_Nk, context)
        if self.record is not None:
            experts = len(block.mlp.gate.weight)
            self.record.experts.append(out.experts_Nk.to(torch.int16 if experts <= 1 << 15 else torch.int32))
        return out.h_BTnD
