"""Attention of DeepSeek-V4 (TR §2.3): shared key-value, sliding window, compressed entries, lightning indexer.

Legend: B rows, T tokens, X tokens that are keys (more than T where a row is cut over ranks), D model, H heads, K head
dimension, C compressed entries, S selected entries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from lab_utils.models.deepseek_v4.layers import Context, Norm, linear, operator

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
WINDOW_ONLY = "sliding_attention"


class Pool(nn.Module):
    """Windows of m tokens to entries (TR §2.3.1-2), normed and rotated; base of both compressors and of the indexer."""

    def __init__(self, config: DeepseekV4Config, layer_type: str, width: int):
        super().__init__()
        self.rate, self.overlap = config.compress_rates[layer_type], layer_type == CSA
        inner = width * (2 if self.overlap else 1)
        self.kv_proj = linear(config.hidden_size, inner)
        self.gate_proj = linear(config.hidden_size, inner)
        self.position_bias = nn.Parameter(torch.empty(self.rate, inner))
        self.kv_norm = Norm(width, config.rms_norm_eps)

    def entries(self, keys_BXD: Tensor, context: Context) -> Tensor:
        """The row's ``[B, C, K]`` with C = T div m, from the tokens that are keys."""
        pooled_BCK = operator("compressor", keys_BXD)(
            self.kv_proj(keys_BXD),
            self.gate_proj(keys_BXD),
            self.position_bias,
            context.geometry,
            rate=self.rate,
            overlap=self.overlap,
        )
        angles = context.angles("compress", self.rate)
        return context.of_row(operator("rope", keys_BXD)(self.kv_norm(pooled_BCK), *angles), self.rate)


class Scorer(nn.Module):
    """Weight of each indexer head (TR eq. 15)."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.weights_proj = linear(config.hidden_size, config.index_n_heads)
        self.factor = config.index_n_heads**-0.5 * config.index_head_dim**-0.5


class Indexer(Pool):
    """Scores entries and keeps the top-k of each query. Only its own KL loss trains it: inputs come detached."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__(config, CSA, config.index_head_dim)
        self.heads, self.topk = config.index_n_heads, config.index_topk
        self.q_b_proj = linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim)
        self.scorer = Scorer(config)

    def forward(
        self, x_BTD: Tensor, q_residual_BTQ: Tensor, keys_BXD: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, T, Hi, Ki]``, keys ``[B, C, Ki]`` and head weights ``[B, T, Hi]`` (fp32, with all scales)."""
        q_BTHK = self.q_b_proj(q_residual_BTQ).unflatten(-1, (self.heads, -1))
        cos, sin = context.angles("compress")
        q_BTHK = operator("rope", x_BTD)(q_BTHK, cos[:, :, None], sin[:, :, None])
        weights_BTH = self.scorer.weights_proj(x_BTD).float() * self.scorer.factor
        return q_BTHK, self.entries(keys_BXD, context), weights_BTH


class Compressor(Pool):
    """HCA's compressor, or CSA's with its indexer."""

    def __init__(self, config: DeepseekV4Config, layer_type: str):
        super().__init__(config, layer_type, config.head_dim)
        self.indexer = Indexer(config) if layer_type == CSA else None


class GroupedLinear(nn.Module):
    """Block-diagonal linear: group γ of the inputs to group γ of the outputs (TR §2.3.1, grouped output projection)."""

    def __init__(self, groups: int, inputs: int, outputs: int):
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.empty(groups * outputs, inputs))

    def forward(self, x_BTX: Tensor) -> Tensor:
        return operator("linear", x_BTX)(x_BTX, self.weight.unflatten(0, (self.groups, -1)))


class Attention(nn.Module):
    """One attention block of any of the three layer types; past the last layer (in an MTP block) window-only."""

    def __init__(self, config: DeepseekV4Config, layer: int):
        super().__init__()
        self.layer_type = config.layer_types[layer] if layer < config.num_hidden_layers else WINDOW_ONLY
        self.rope_kind = "compress" if self.layer_type in (CSA, HCA) else "main"
        self.heads, self.window, self.eps = (
            config.num_attention_heads,
            config.sliding_window,
            config.rms_norm_eps,
        )
        H, K, groups = config.num_attention_heads, config.head_dim, config.o_groups
        self.q_a_proj = linear(config.hidden_size, config.q_lora_rank)
        self.q_a_norm = Norm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = linear(config.q_lora_rank, H * K)
        self.kv_proj = linear(config.hidden_size, K)
        self.kv_norm = Norm(K, config.rms_norm_eps)
        self.o_a_proj = GroupedLinear(groups, H * K // groups, config.o_lora_rank)
        self.o_b_proj = linear(groups * config.o_lora_rank, config.hidden_size)
        self.sinks = nn.Parameter(torch.empty(H))
        self.compressor = Compressor(config, self.layer_type) if self.layer_type in (CSA, HCA) else None

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The block's output ``[B, T, D]`` and, in CSA layers that want it, the indexer's ``(KL sum, queries)``."""
        geometry, angles, caching = context.geometry, context.angles(self.rope_kind), context.caching
        if caching is not None and caching.step is not None:
            out_R1HK = caching.layers[self].step(x_BTD, angles, caching.step)
            return self.o_b_proj(self.o_a_proj(out_R1HK.flatten(2))), None
        q_residual = self.q_a_norm(self.q_a_proj(x_BTD))
        q_BTHK = self.q_b_proj(q_residual).unflatten(-1, (self.heads, -1))
        keys_BXD = context.with_before(x_BTD)
        kv_BXK = operator("rope", x_BTD)(
            self.kv_norm(self.kv_proj(keys_BXD)), *context.key_angles(self.rope_kind)
        )
        rate = self.compressor.rate if self.compressor else None
        entries_BCK = self.compressor.entries(keys_BXD, context) if self.compressor else None
        indexed = selected_BTS = None
        if self.compressor and self.compressor.indexer and entries_BCK.shape[1]:
            indexer = self.compressor.indexer
            # With no more entries than the top-k, every visible one is attended and only the loss needs scores.
            selects = not context.dense and entries_BCK.shape[1] > indexer.topk
            if context.indexer_loss or selects:
                with torch.set_grad_enabled(context.indexer_loss and torch.is_grad_enabled()):
                    indexed = indexer(x_BTD.detach(), q_residual.detach(), keys_BXD.detach(), context)
            if selects:
                selected_BTS = operator("indexer_select", x_BTD)(
                    *indexed, geometry, rate=rate, topk=indexer.topk
                )
        out_BTHK, mass = operator("shared_kv_attention", x_BTD)(
            q_BTHK,
            kv_BXK,
            self.sinks,
            *angles,
            geometry,
            window=self.window,
            eps=self.eps,
            entries_BCK=entries_BCK,
            rate=rate,
            selected_BTS=selected_BTS,
            want_mass=context.indexer_loss and indexed is not None,
        )
        if caching is not None:
            keys_BCK = None
            if self.compressor and self.compressor.indexer:
                keys_BCK = indexed[1] if indexed else self.compressor.indexer.entries(x_BTD, context)
            caching.layers[self].fill(x_BTD, kv_BXK, entries_BCK, keys_BCK, caching.filling)
        kl = None
        if mass is not None:
            kl = operator("indexer_kl", x_BTD)(*indexed, mass, geometry, rate=rate, selected_BTS=selected_BTS)
        return self.o_b_proj(self.o_a_proj(out_BTHK.flatten(2))), kl
