"""Log-probabilities by token and sums by document, against the dense formula and plain loops."""

from __future__ import annotations

import pytest
import torch

from lab_utils.data.rows import PackedRows
from lab_utils.objectives._logps import document_roles, document_sums, token_logps

B, T, D, V = 3, 14, 5, 23


def make(seed: int) -> tuple[torch.Tensor, torch.Tensor, PackedRows]:
    """Ragged documents with some loss, padding behind them, the last row padding alone."""
    g = torch.Generator().manual_seed(seed)
    positions, documents = torch.arange(T).repeat(B, 1), torch.full((B, T), -1)
    for b in range(B - 1):
        at = number = 0
        while (stop := at + int(torch.randint(1, 6, (), generator=g))) <= T:
            positions[b, at:stop], documents[b, at:stop] = torch.arange(stop - at), number
            at, number = stop, number + 1
    weights = (torch.rand(B, T, generator=g) < 0.6) * 0.5 * (positions > 0) * (documents >= 0)
    role = torch.randint(0, 3, (B, T), generator=g).gather(1, documents.clamp(min=0))
    rows = PackedRows(
        torch.randint(0, V, (B, T), generator=g),
        positions,
        documents,
        weights,
        {"role": role.where(documents >= 0, -1).to(torch.int8)},
    )
    hidden = torch.randn(B, T, D, generator=g).requires_grad_()
    return hidden, torch.randn(V, D, generator=g).requires_grad_(), rows


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_token_values_are_the_dense_formula(seed, temperature):
    hidden, head, rows = make(seed)
    logps, correct, entropy = token_logps(hidden, head, rows, temperature)
    log_p = torch.log_softmax(hidden[:, :-1] @ head.T / temperature, -1)
    bears, targets = rows.loss_weights[:, 1:] != 0, rows.input_ids[:, 1:]
    expected = log_p.gather(-1, targets[..., None]).squeeze(-1) * bears
    torch.testing.assert_close(logps[:, 1:], expected)
    assert torch.equal(correct[:, 1:], (log_p.argmax(-1) == targets) & bears)
    torch.testing.assert_close(entropy[:, 1:], -(log_p.exp() * log_p).sum(-1) * bears)
    assert not (logps[:, 0].any() or correct[:, 0].any() or entropy[:, 0].any() or entropy.requires_grad)
    weights = torch.randn(B, T, generator=torch.Generator().manual_seed(seed))
    ours = torch.autograd.grad((weights * logps).sum(), [hidden, head])
    theirs = torch.autograd.grad((weights[:, 1:] * expected).sum(), [hidden, head])
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_the_temperature_is_applied_in_full_precision():
    hidden, head, rows = make(0)
    hidden, head = hidden.detach().bfloat16(), head.detach().bfloat16()
    exact = token_logps(hidden.double(), head.double(), rows, 0.7)[0]
    found = token_logps(hidden, head, rows, 0.7)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_documents_are_summed_and_named_one_by_one(seed):
    hidden, head, rows = make(seed)
    logps, correct, _ = token_logps(hidden, head, rows)
    sums, hits, roles = document_sums(logps, rows), document_sums(correct, rows), document_roles(rows)
    most = int(rows.document_ids.max()) + 1
    assert sums.shape == hits.shape == roles.shape == (B, most)
    for b in range(B):
        for d in range(most):
            of = rows.document_ids[b] == d
            assert float(sums[b, d].detach()) == pytest.approx(float(logps[b, of].sum().detach()), abs=1e-5)
            assert int(hits[b, d]) == int(correct[b, of].sum())
            assert int(roles[b, d]) == (int(rows.side["role"][b, of][0]) if of.any() else -1)


def test_rows_without_loss_have_a_gradient_of_zero():
    hidden, head, rows = make(0)
    padding = rows.slice(B - 1, B)
    logps = token_logps(hidden[B - 1 :], head, padding)[0]
    sums = document_sums(logps, padding)
    assert sums.shape == (1, 0)
    sums.sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()
