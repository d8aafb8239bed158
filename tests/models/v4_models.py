"""Small DeepSeek-V4s with weights spread wide enough that every part matters, and packed rows for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV4Config

from lab_utils.models.deepseek_v4.initialize import initialize
from lab_utils.models.deepseek_v4.model import DeepseekV4

S, C, H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
V = 61


def config(seed: int = 0, **changes: Any) -> DeepseekV4Config:
    """All three layer types, one hash layer, sizes that depend on the seed."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=draw))]

    tree = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "vocab_size": V,
        "hidden_size": pick(16, 24),
        "num_hidden_layers": 3,
        "layer_types": [S, C, H],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_attention_heads": 4,
        "head_dim": pick(8, 16),
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 12,
        "o_groups": 2,
        "o_lora_rank": 8,
        "n_routed_experts": pick(5, 8),
        "num_experts_per_tok": pick(2, 3),
        "moe_intermediate_size": 8,
        "compress_rates": {C: pick(2, 4), H: 8},
        "sliding_window": pick(4, 8),
        "index_n_heads": 8,
        "index_head_dim": 8,
        "index_topk": 3,
        "hc_sinkhorn_iters": 4,
        "max_position_embeddings": 256,
    }
    return DeepseekV4Config(**{**tree, **changes})


def build(seed: int = 0, changes: dict[str, Any] | None = None, **options: Any) -> DeepseekV4:
    """A model with random weights, biases included; the same for a seed whatever its options."""
    model = DeepseekV4(config(seed, **(changes or {})), **options)
    initialize(model, seed)
    tensors = dict(model.named_parameters()) | {
        name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")
    }
    with torch.no_grad():
        for main in (True, False):
            draw = torch.Generator().manual_seed(seed + 100 * main)
            for name, tensor in tensors.items():
                if main == (not name.startswith("mtp.")):
                    std = 0.1 if name.endswith("_bias") else 0.3 if tensor.ndim > 1 else 0.5
                    tensor.copy_(torch.empty(tensor.shape).normal_(std=std, generator=draw))
                    if "norm" in name:
                        tensor.add_(1.0)
    return model


def documents(seed: int, lengths: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and loss weights of documents of these lengths; some weights are zero, as a prompt's are."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        weights = torch.rand(length, generator=draw) * (torch.rand(length, generator=draw) < 0.7)
        weights[0] = 0
        found.append((torch.randint(0, V, (length,), generator=draw), weights))
    return found


def row(parts: list[tuple[torch.Tensor, torch.Tensor]], padding: int = 0) -> dict[str, torch.Tensor]:
    """One packed row ``[1, T]`` of documents, as a model's forward takes it."""
    lengths = [len(ids) for ids, _ in parts]
    ids = torch.cat([ids for ids, _ in parts] + [torch.full((padding,), 7)])
    weights = torch.cat([w for _, w in parts] + [torch.zeros(padding)])
    positions = torch.cat([torch.arange(n) for n in [*lengths, padding]])
    owners = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "document_ids": owners[None],
        "loss_weights": weights[None],
    }


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss by parameter name; those of parameters that it doesn't reach are left out."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
