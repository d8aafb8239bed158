"""Memory grows linearly with the row length: counted in bytes, not timed."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lab_utils.models.load import load_model


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operator made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // 4 for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


def measured(model, T: int) -> tuple[int, int]:
    """Bytes saved for the backward pass, and elements of the largest tensor of the step's operators."""
    saved: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.randint(0, 2000, (1, T), generator=torch.Generator().manual_seed(T))
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = model(ids, torch.arange(T)[None], torch.zeros_like(ids))
        loss = output.hidden_BTD.square().sum() + output.auxiliary["indexer_kl"].total
        loss.backward()
    return sum(saved.values()), largest.elements


def test_twice_the_tokens_take_twice_the_memory():
    model = load_model("base:tiny", dtype=torch.float32)
    weights = sum(p.numel() for p in model.parameters()) * 4
    short, long = measured(model, 2048), measured(model, 4096)
    # The weights are saved too, whatever the length.
    assert (long[0] - weights) < 2.1 * (short[0] - weights)
    assert long[1] < 4096 * 4096 / 4, "no tensor of the order of T times T"
    assert long[1] <= 2.1 * short[1]
