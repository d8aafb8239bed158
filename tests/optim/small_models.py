"""Models for the optimizer's tests: a DeepSeek-V4 of a few thousand weights with every layer type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from lab_utils.models.deepseek_v4.initialize import initialize
from lab_utils.models.deepseek_v4.model import DeepseekV4
from lab_utils.models.presets import preset

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "num_attention_heads": 4,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "sliding_window": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,
}


def small_config(**changes: Any) -> DeepseekV4Config:
    tree = preset("tiny").to_dict()
    for derived in ("rope_parameters", "compress_ratios"):
        tree.pop(derived, None)
    return DeepseekV4Config(**{**tree, **SMALL, **changes})


def small_model(seed: int = 0, **changes: Any) -> DeepseekV4:
    model = DeepseekV4(small_config(**changes))
    initialize(model, seed)
    return model


def loss_of(model: DeepseekV4, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, and the indexer's own loss."""
    positions = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    output = model(ids_BT, positions, torch.zeros_like(ids_BT))
    logits = output.hidden_BTD[:, :-1] @ model.head_weight.T
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
    for auxiliary in output.auxiliary.values():
        loss = loss + auxiliary.weight * auxiliary.total / auxiliary.count
    return loss


def sentences(step: int, rows: int = 4, length: int = 40, vocab: int = 61) -> Tensor:
    """``[rows, length]`` token ids in which the next one mostly follows from the last."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(0, vocab, (rows, length), generator=g)
    for t in range(1, length):
        follows = torch.rand(rows, generator=g) < 0.9
        ids[:, t] = torch.where(follows, (ids[:, t - 1] * 7 + 1) % vocab, ids[:, t])
    return ids
