"""DeepSeek-V4 for training: configuration and parameter names of transformers, memory linear in the row length.

Legend: B rows, T tokens, D model, V vocabulary, n streams.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV4Config

from kernels.geometry import Geometry
from lab_utils.models.base import AuxiliaryLoss, ModelOutput
from lab_utils.models.deepseek_v4.attention import CSA, Attention
from lab_utils.models.deepseek_v4.counting import training_flops
from lab_utils.models.deepseek_v4.hyper_connections import HyperConnection, HyperHead
from lab_utils.models.deepseek_v4.layers import Context, Norm, linear
from lab_utils.models.deepseek_v4.moe import MoE
from lab_utils.models.deepseek_v4.rotary import Rotary


class Layer(nn.Module):
    """Attention and MoE, each inside its own hyper-connection."""

    def __init__(self, config: DeepseekV4Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MoE(config, layer)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.attn_hc = HyperConnection(config)
        self.ffn_hc = HyperConnection(config)

    def forward(self, h_BTnD: Tensor, context: Context) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        x_BTD, kept = self.attn_hc.collapse(h_BTnD)
        y_BTD, kl = self.self_attn(self.input_layernorm(x_BTD), context)
        h_BTnD = self.attn_hc.expand(y_BTD, kept)
        x_BTD, kept = self.ffn_hc.collapse(h_BTnD)
        return self.ffn_hc.expand(self.mlp(self.post_attention_layernorm(x_BTD), context), kept), kl


class Decoder(nn.Module):
    """Embedding, layers, the streams' collapse and the final norm."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.embed_tokens = nn.utils.skip_init(nn.Embedding, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperHead(config)


class DeepseekV4(nn.Module):
    """A ``TrainableModel``; ``state_dict`` has the names and shapes of transformers' ``DeepseekV4ForCausalLM``.

    Args:
        config: transformers' configuration.
        indexer_loss: weight of the lightning indexer's KL loss; 0 leaves it out (and the indexer untrained).
        checkpointing: "full" recomputes each layer in the backward pass, "none" keeps what it needs.
    """

    def __init__(self, config: DeepseekV4Config, *, indexer_loss: float = 0.01, checkpointing: str = "none"):
        super().__init__()
        self.config, self.indexer_loss, self.checkpointing = config, indexer_loss, checkpointing
        self.model = Decoder(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.rotary = Rotary(config)

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight

    def flops_per_token(self, document_lengths: list[int]) -> float:
        return training_flops(self.config, document_lengths, indexer_trained=self.indexer_loss > 0)

    def auxiliary_counts(self, position_ids: Tensor, document_ids: Tensor) -> dict[str, Tensor]:
        """What the auxiliary losses of these rows will be means over, known before the forward pass.

        For the indexer's KL: tokens that see a whole compressed entry of their document, in every CSA layer.
        """
        if not self.indexer_loss:
            return {}
        sees_BT = (document_ids >= 0) & (position_ids >= self.config.compress_rates[CSA] - 1)
        return {"indexer_kl": sees_BT.sum() * self.config.layer_types.count(CSA)}

    def forward(self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor) -> ModelOutput:
        """Packed rows ``[B, T]`` to final hidden states; see ``ModelOutput``."""
        wanted = self.indexer_loss > 0 and torch.is_grad_enabled()
        context = Context(input_ids, Geometry(position_ids, document_ids), self.rotary, wanted)
        embedded_BTD = self.model.embed_tokens(input_ids)
        h_BTnD = embedded_BTD[:, :, None].expand(-1, -1, self.config.hc_mult, -1).contiguous()
        losses = []
        for layer in self.model.layers:
            if self.checkpointing == "full" and torch.is_grad_enabled():
                h_BTnD, kl = checkpoint(layer, h_BTnD, context, use_reentrant=False)
            else:
                h_BTnD, kl = layer(h_BTnD, context)
            if kl is not None:
                losses.append(kl)
        output = ModelOutput(self.model.norm(self.model.hc_head(h_BTnD)))
        if losses:
            total, count = (torch.stack(column).sum() for column in zip(*losses))
            output.auxiliary["indexer_kl"] = AuxiliaryLoss(total, count, self.indexer_loss)
        return output
