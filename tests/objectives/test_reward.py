"""The reward model's loss: by hand, against the formula, and the same however the pairs are packed and split."""

from __future__ import annotations

from math import log

import pytest
import torch
from pair_rows import D, Doc, T, make_pairs, pack

from lab_utils.data.rows import PackedRows
from lab_utils.objectives import get_objective
from lab_utils.recipe.objectives import RewardObjective
from lab_utils.telemetry.names import lookup
from lab_utils.telemetry.reductions import reduce_metrics


def objective_of(**options):
    return get_objective(RewardObjective(kind="reward", **options))


def head_of(seed: int) -> torch.Tensor:
    return torch.randn(1, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def score(doc: Doc, head: torch.Tensor) -> torch.Tensor:
    return (doc.hidden[-1].double() * head[0].double()).sum()


def formula(pairs: list[list[Doc]], head: torch.Tensor, margin: float, centring: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for chosen, rejected in pairs:
        a, b = score(chosen, head), score(rejected, head)
        total = total - torch.log(1 / (1 + torch.exp(-(a - b - margin)))) + centring * (a + b).square()
    return total


def test_a_pair_worked_out_by_hand():
    pairs, _ = make_pairs(0, 1)
    with torch.no_grad():
        for doc, value in zip(pairs[0], (2.0, 1.0)):
            doc.hidden.fill_(9.0)  # of all but the last token
            doc.hidden[-1] = value / D
    hidden, rows = pack([pairs])
    output = objective_of(margin=1.0, centring=0.5)(hidden, torch.ones(1, D), rows)
    assert float(output.loss.total.detach()) == pytest.approx(log(2) + 0.5 * 9, rel=1e-5)
    values = {key: metric.value for key, metric in output.metrics.items()}
    expected = {"accuracy": 1, "margin": 1, "mean_reward": 1.5, "min_reward": 1, "max_reward": 2}
    assert values == pytest.approx(expected)


@pytest.mark.parametrize("margin, centring", [(0.0, 0.0), (0.0, 0.01), (0.7, 0.3)])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_are_the_formula(margin, centring, seed):
    pairs, _ = make_pairs(seed, 4)
    head = head_of(seed)
    hidden, rows = pack([pairs[:1], [], pairs[1:2], pairs[2:]])
    objective = objective_of(margin=margin, centring=centring)
    output = objective(hidden, head, rows)
    expected = formula(pairs, head, margin, centring)
    assert float(output.loss.count) == objective.denominator(rows) == 4
    torch.testing.assert_close(output.loss.total.double(), expected, rtol=1e-5, atol=1e-5)
    inputs = [head, *(doc.hidden for pair in pairs for doc in pair)]
    ours, theirs = (torch.autograd.grad(total, inputs) for total in (output.loss.total, expected))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    for leaf in output.metrics:
        assert lookup(f"train/{leaf}") is not None, leaf


def test_a_document_that_fills_its_row_is_scored_at_the_last_token():
    pairs, _ = make_pairs(4, 1)
    used = sum(len(doc.ids) for doc in pairs[0])
    hidden, rows = pack([pairs])
    full = PackedRows(
        rows.input_ids[:, :used],
        rows.position_ids[:, :used],
        rows.document_ids[:, :used],
        rows.loss_weights[:, :used],
        {"role": rows.side["role"][:, :used]},
    )
    head, objective = head_of(0), objective_of()
    cut, whole = objective(hidden[:, :used], head, full), objective(hidden, head, rows)
    assert float(cut.loss.total.detach()) == float(whole.loss.total.detach()) and float(cut.loss.count) == 1


def test_the_same_pairs_in_other_micro_batches_give_the_same(monkeypatch):
    pairs, _ = make_pairs(9, 6)
    head, objective = head_of(9), objective_of(margin=0.2)
    monkeypatch.setattr("pair_rows.T", 6 * 2 * 10)

    def learn(*micro):
        parts = [pack(layout) for layout in micro]
        outputs = [objective(hidden, head, rows) for hidden, rows in parts]
        merged = reduce_metrics([{"loss": o.loss, **o.metrics} for o in outputs])
        gradient = sum(torch.autograd.grad(o.loss.total, head)[0] for o in outputs)
        return {key: metric.value for key, metric in merged.items()}, gradient

    whole, gradient = learn([pairs])
    split, other = learn([[pair] for pair in pairs[:2]], [[]], [pairs[2:5], pairs[5:]])
    assert split == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    values = torch.tensor([float(score(doc, head).detach()) for pair in pairs for doc in pair])
    right = [float((score(a, head) > score(b, head)).float()) for a, b in pairs]
    expected = {"min_reward": values.min(), "max_reward": values.max(), "mean_reward": values.mean()}
    assert {key: whole[key] for key in expected} == pytest.approx({k: float(v) for k, v in expected.items()})
    assert whole["accuracy"] == pytest.approx(sum(right) / 6)


def test_rows_of_padding_backpropagate_a_zero():
    pairs, _ = make_pairs(0, 1)
    empty = pack([pairs])[1].with_rows(3).slice(1, 3)
    hidden, head, objective = torch.randn(2, T, D).requires_grad_(), head_of(0), objective_of()
    output = objective(hidden, head, empty)
    output.loss.total.backward()
    assert float(output.loss.total.detach()) == 0 == float(output.loss.count) == objective.denominator(empty)
    assert not hidden.grad.any() and not head.grad.any()
    assert all(metric.empty for metric in output.metrics.values())
