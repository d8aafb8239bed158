"""Every objective, and supervised fine-tuning against the dense formula."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter

from lab_utils.data.rows import PackedRows
from lab_utils.errors import RecipeError
from lab_utils.objectives import get_objective
from lab_utils.recipe.objectives import Objective
from lab_utils.registry import members
from lab_utils.telemetry.names import lookup
from lab_utils.telemetry.reductions import Mean, reduce_metrics

B, T, D, V = 3, 12, 8, 29


def make(seed: int = 0, share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, PackedRows]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=g).requires_grad_()
    head = torch.randn(V, D, generator=g).requires_grad_()
    positions = torch.arange(T).repeat(B, 1) % 5
    weights = (torch.rand(B, T, generator=g) < share) * torch.rand(B, T, generator=g) * (positions > 0)
    documents = torch.arange(T).repeat(B, 1) // 5  # three: chosen, rejected and mismatched of a pair
    side = {"role": documents.to(torch.int8), "reference_logps": torch.zeros(B, T)}
    side |= {"advantages": torch.randn(B, T, generator=g), "teacher": torch.zeros(B, T, dtype=torch.int16)}
    side |= {"teacher_weight": torch.ones(B, T), "teacher_hidden": torch.randn(B, T, D, generator=g)}
    rows = PackedRows(torch.randint(0, V, (B, T), generator=g), positions, documents, weights, side)
    return hidden, head, rows


SECTIONS = {
    "sft": {},
    "preference": {},
    "reward": {},
    "grpo": {},
    "distill": {"teachers": [{"source": "base:tiny"}]},
}


@pytest.mark.parametrize("kind", members("lab_utils.objectives"))
def test_objectives_conform(kind: str) -> None:
    """Sums with counts, a scalar with a gradient, described metrics, a denominator known beforehand, empty rows."""
    objective = get_objective(TypeAdapter(Objective).validate_python({"kind": kind, **SECTIONS[kind]}))
    hidden, head, rows = make()
    if kind == "distill":
        objective.heads[0] = torch.randn(V, D)
    if kind == "reward":  # its head gives a score
        head = head[:1].detach().requires_grad_()
    output = objective(hidden, head, rows)
    assert isinstance(output.loss, Mean) and output.loss.total.ndim == 0
    assert float(output.loss.count) == pytest.approx(objective.denominator(rows))
    output.loss.total.backward()
    assert hidden.grad.abs().sum() > 0 and head.grad.abs().sum() > 0
    for leaf in output.metrics:
        assert lookup(f"train/{leaf}") is not None, leaf
    rows = rows.with_rows(2 * B).slice(B, 2 * B)  # padding alone
    hidden.grad = None
    empty = objective(hidden, head, rows)
    empty.loss.total.backward()
    assert float(empty.loss.total.detach()) == 0 == float(empty.loss.count) == objective.denominator(rows)
    assert not hidden.grad.any()


def test_sft_is_the_dense_formula() -> None:
    hidden, head, rows = make(1)
    sft = get_objective(SimpleNamespace(kind="sft"))
    output = sft(hidden, head, rows)
    output.loss.total.backward()
    ours = (hidden.grad.clone(), head.grad.clone())
    hidden.grad = head.grad = None
    logp = torch.log_softmax(hidden[:, :-1] @ head.T, -1)
    targets, w = rows.input_ids[:, 1:], rows.loss_weights[:, 1:]
    expected = -(w * logp.gather(-1, targets[..., None]).squeeze(-1)).sum()
    expected.backward()
    torch.testing.assert_close(output.loss.total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1], head.grad, rtol=1e-4, atol=1e-6)
    kept = w > 0
    hits = (logp.argmax(-1) == targets)[kept].float().mean()
    entropy = -(logp.exp() * logp).sum(-1)[kept].mean()
    assert output.metrics["mean_token_accuracy"].value == pytest.approx(float(hits))
    assert output.metrics["entropy"].value == pytest.approx(float(entropy), rel=1e-4)


def test_rows_taken_apart_add_up_to_the_whole() -> None:
    hidden, head, rows = make(2)
    sft = get_objective(SimpleNamespace(kind="sft"))
    whole = sft(hidden, head, rows)
    parts = [sft(hidden[i : i + 1], head, rows.slice(i, i + 1)) for i in range(B)]
    together = reduce_metrics([{"loss": part.loss, **part.metrics} for part in parts])
    assert together["loss"].value == pytest.approx(whole.loss.value, rel=1e-6)
    assert together["entropy"].value == pytest.approx(whole.metrics["entropy"].value, rel=1e-6)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(RecipeError, match="sft"):
        get_objective(SimpleNamespace(kind="sftt"))
