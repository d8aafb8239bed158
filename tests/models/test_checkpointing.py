"""Activations made again: the same loss and gradients, and less kept, as ``block.py`` says."""

from __future__ import annotations

import pytest
import torch
from v4_models import build, documents, gradients, relative, row

KINDS = ("none", "mhc", "attention", "full")


def run(kind: str) -> tuple[torch.Tensor, dict, int]:
    """Loss, gradients, and bytes that the forward pass left for the backward pass (each storage once)."""
    model = build(3, {"num_nextn_predict_layers": 1}, mtp_loss=0.3, checkpointing=kind).train()
    rows = row(documents(5, [23, 9, 31]), padding=3)
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**rows)
        loss = output.hidden_BTD.square().mean() + sum(a.total for a in output.auxiliary.values())
        held = sum(kept.values())
    return loss.detach(), gradients(model, loss), held


@pytest.mark.parametrize("kind", KINDS[1:])
def test_nothing_changes_but_memory(kind):
    loss, expected, most = run("none")
    again, found, held = run(kind)
    assert relative(again, loss) < 1e-6
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-4 or gradient.abs().max() < 1e-9, name
    assert held < 0.95 * most


def test_more_made_again_is_less_kept():
    held = {kind: run(kind)[2] for kind in KINDS}
    assert held["full"] < held["mhc"] < held["none"]
    assert held["full"] < held["attention"] < held["none"]
