"""Named DeepSeek-V4 configurations: ``tiny`` (a laptop), ``reference`` (the yardstick of ``lab bench step``), ``mini``
(one large accelerator), ``flash`` and ``pro`` (the released models: TR §4.2.1 and their config.json).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab_utils.errors import RecipeError
from lab_utils.registry import nearest

if TYPE_CHECKING:
    from transformers import DeepseekV4Config

S, C, H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

_RELEASED: dict[str, Any] = {
    "vocab_size": 129280,
    "head_dim": 512,
    "compress_rates": {C: 4, H: 128},
    "index_n_heads": 64,
    "index_head_dim": 128,
    "sliding_window": 128,
    "o_lora_rank": 1024,
    "num_hash_layers": 3,
    "partial_rotary_factor": 64 / 512,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}

_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "layer_types": [S, C, H, C],
        "mlp_layer_types": ["hash_moe"] + ["moe"] * 3,
        "num_attention_heads": 4,
        "head_dim": 32,
        "partial_rotary_factor": 16 / 32,
        "q_lora_rank": 64,
        "o_groups": 2,
        "o_lora_rank": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "compress_rates": {C: 4, H: 16},
        "sliding_window": 64,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 16,
        "hc_sinkhorn_iters": 8,
        "max_position_embeddings": 8192,
    },
    "reference": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "layer_types": [S, S, C, H, C, H, C, H],
        "mlp_layer_types": ["hash_moe"] + ["moe"] * 7,
        "num_attention_heads": 8,
        "head_dim": 64,
        "partial_rotary_factor": 32 / 64,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 64,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "compress_rates": {C: 4, H: 32},
        "sliding_window": 64,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 128,
        "max_position_embeddings": 16384,
    },
    "mini": {
        **_RELEASED,
        "hidden_size": 1536,
        "num_hidden_layers": 16,
        "layer_types": [S, S] + [C, H] * 7,
        "num_attention_heads": 16,
        "head_dim": 256,
        "partial_rotary_factor": 64 / 256,
        "q_lora_rank": 512,
        "o_groups": 4,
        "o_lora_rank": 512,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 512,
        "index_n_heads": 16,
        "index_topk": 512,
        "max_position_embeddings": 65536,
    },
    "flash": {
        **_RELEASED,
        "hidden_size": 4096,
        "num_hidden_layers": 43,
        "layer_types": [S, S] + [C, H] * 20 + [C],
        "num_attention_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 2048,
        "index_topk": 512,
        "routed_scaling_factor": 1.5,
    },
    "pro": {
        **_RELEASED,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "layer_types": [H, H] + [C, H] * 29 + [C],
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "n_routed_experts": 384,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 3072,
        "index_topk": 1024,
        "routed_scaling_factor": 2.5,
    },
}


def presets() -> list[str]:
    """Names of the presets, smallest first."""
    return list(_PRESETS)


def preset(name: str) -> DeepseekV4Config:
    """The configuration of a preset, fresh: it may be changed.

    Raises:
        RecipeError: there is no such preset; the message names the nearest one.
    """
    from transformers import DeepseekV4Config

    if name not in _PRESETS:
        raise RecipeError(f"model.source: there is no preset '{name}': {nearest(name, presets())}.")
    return DeepseekV4Config(architectures=["DeepseekV4ForCausalLM"], **_PRESETS[name])
