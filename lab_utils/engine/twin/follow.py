"""The twin's ledger on a rank that is there: bytes of the tensors alive, where no allocator of a device counts them."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lab_utils.engine.twin.ledger import Ledger


class Following(TorchDispatchMode):
    """Within the block every tensor that an operator makes is in the ledger until it goes."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.ledger.see(tensor, str(func))
        return out
