"""Fresh weights of a DeepSeek-V4, the same for a seed on every rank and device.

Matrices are normal with ``initializer_range``; the scales of the hyper-connections start small, so that streams first
mix evenly (TR §2.2); the tables of hash layers give every expert the same number of token ids.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HC_SCALE = 0.01


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of a ``DeepseekV4`` in place."""
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("scale", "hc_scale"):
            parameter.fill_(HC_SCALE)
        elif leaf in ("base", "hc_base", "sinks", "position_bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            # Drawn in fp32 on the host, so that neither dtype nor device changes the numbers.
            parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(balanced_table(*buffer.shape, model.config.n_routed_experts, generator))
        else:
            buffer.zero_()


def balanced_table(tokens: int, k: int, experts: int, generator: torch.Generator) -> Tensor:
    """``tid2eid [V, k]``: k different experts for each token id, each expert equally often (up to one block)."""
    blocks = -(-tokens // experts)
    ranks = torch.rand(blocks, experts, generator=generator).argsort(
        1
    )  # a permutation of the experts a block
    shifts = torch.randperm(experts, generator=generator)[:k]
    table = torch.stack([ranks.roll(int(shift), 1) for shift in shifts], -1).view(-1, k)[:tokens]
    return table[torch.randperm(tokens, generator=generator)]
