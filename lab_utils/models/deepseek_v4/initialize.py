"""Fresh weights of a DeepSeek-V4, the same for a seed on every rank and device.

Matrices are normal with ``initializer_range``; the scales of the hyper-connections start small, so that streams first
mix evenly (TR §2.2); the tables of hash layers give every expert the same number of token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HC_SCALE = 0.01
BUFFERS = ("tid2eid", "e_score_correction_bias")
MTP_STREAM = 1 << 32  # added to the seed: the main weights are the same with and without the blocks


Put = Callable[[str, Tensor], None]


@torch.no_grad()
def initialize(model: nn.Module, seed: int, put: Put | None = None) -> None:
    """Fill every parameter and buffer of a ``DeepseekV4``.

    Args:
        put: takes a name and the value of it that the model holds; absent: written in place.
    """
    _fill(model, seed, lambda name: not name.startswith("mtp."), put)
    initialize_mtp(model, seed, put)


@torch.no_grad()
def initialize_mtp(model: nn.Module, seed: int, put: Put | None = None) -> None:
    """Fill the blocks of multi-token prediction alone."""
    _fill(model, seed + MTP_STREAM, lambda name: name.startswith("mtp."), put)


@torch.no_grad()
def initialize_score(model: nn.Module, seed: int, put: Put | None = None) -> None:
    """Fill the head of a reward model alone."""
    _fill(model, seed + MTP_STREAM, lambda name: name == "score.weight", put)


def _fill(model: nn.Module, seed: int, wanted: Callable[[str], bool], put: Put | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    held = model.state_dict(keep_vars=True)
    put = put or (lambda name, value: held[name].copy_(value))
    # Parameters first, then buffers. One that another rank holds is drawn too, so that numbers don't depend on a cut.
    for buffers in (False, True):
        for name, shape in model.whole_shapes.items():
            leaf = name.rsplit(".", 1)[-1]
            if not wanted(name) or (leaf in BUFFERS) != buffers:
                continue
            value = _fresh(leaf, shape, model.config, generator)
            if name in held:
                start = getattr(held[name], "rows", (0,))[0]
                put(name, value[start : start + len(held[name])] if value.ndim else value)


def _fresh(leaf: str, shape: tuple[int, ...], config: Any, generator: torch.Generator) -> Tensor:
    if leaf == "tid2eid":
        return balanced_table(*shape, config.n_routed_experts, generator)
    if leaf in ("scale", "hc_scale"):
        return torch.full(shape, HC_SCALE)
    if leaf in ("base", "hc_base", "sinks", "position_bias", "e_score_correction_bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    # Drawn in fp32 on the host, so that neither dtype nor device changes the numbers.
    return torch.empty(shape).normal_(std=config.initializer_range, generator=generator)


def balanced_table(tokens: int, k: int, experts: int, generator: torch.Generator) -> Tensor:
    """``tid2eid [V, k]``: k different experts for each token id, each expert equally often (up to one block)."""
    blocks = -(-tokens // experts)
    ranks = torch.rand(blocks, experts, generator=generator).argsort(
        1
    )  # a permutation of the experts a block
    shifts = torch.randperm(experts, generator=generator)[:k]
    table = torch.stack([ranks.roll(int(shift), 1) for shift in shifts], -1).view(-1, k)[:tokens]
    return table[torch.randperm(tokens, generator=generator)]
