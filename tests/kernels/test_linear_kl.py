"""Divergence over the whole vocabulary: against autograd on dense softmaxes, and what it must hold and not hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from kernels import registry
from kernels._cases import normal

NAMES = ("student_hidden_ND", "student_head_VD", "teacher_hidden_NE", "teacher_head_VE")


def draw(seed: int, N: int, D: int, E: int, V: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [normal(g, N, D), normal(g, V, D), normal(g, N, E), normal(g, V, E)]


def dense(inputs: list[torch.Tensor], kind: str, beta: float) -> torch.Tensor:
    """By torch's own distributions."""
    q = Categorical(logits=inputs[0] @ inputs[1].T)
    p = Categorical(logits=inputs[2] @ inputs[3].T)
    if kind == "reverse":
        return kl_divergence(q, p)
    if kind == "forward":
        return kl_divergence(p, q)
    m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)


def run(name: str, inputs: list[torch.Tensor], **options) -> torch.Tensor:
    with registry.force(linear_kl=name):
        return registry.get("linear_kl", "cpu", inputs[0].dtype)(*inputs, **options)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("kind", ["reverse", "forward", "js"])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    N=st.integers(1, 12),
    D=st.integers(1, 8),
    E=st.integers(1, 8),
    V=st.integers(2, 30),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    chunk=st.sampled_from([None, 1, 5]),
)
def test_values_and_gradients_are_those_of_dense_softmaxes(name, kind, seed, N, D, E, V, beta, chunk):
    inputs = draw(seed, N, D, E, V)
    weight = torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    results = []
    for call in (
        lambda x: run(name, x, kind=kind, beta=beta, chunk=chunk),
        lambda x: dense([*x[:2], *(t.detach() for t in x[2:])], kind, beta),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(leaves)
        (out * weight).sum().backward()
        assert leaves[2].grad is None and leaves[3].grad is None, "the teacher gets no gradient"
        results.append([out.detach(), leaves[0].grad, leaves[1].grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("kind", ["reverse", "forward", "js"])
def test_equal_distributions_have_no_divergence_and_no_gradient(name, kind):
    hidden, head, _, _ = (x.float() for x in draw(0, 6, 5, 1, 20))
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    kl_N = run(name, [*leaves, hidden, head], kind=kind)
    kl_N.sum().backward()
    assert kl_N.dtype == torch.float32 and kl_N.abs().max() < 1e-6
    assert all(leaf.grad.abs().max() < 1e-5 for leaf in leaves)


@pytest.mark.parametrize("kind", ["reverse", "forward", "js"])
def test_logits_far_apart_stay_finite(kind):
    inputs = [x.float() * 40 for x in draw(1, 6, 5, 4, 20)]
    leaves = [inputs[0].requires_grad_(), inputs[1].requires_grad_()]
    kl_N = run("torch", inputs, kind=kind)
    kl_N.sum().backward()
    assert kl_N.isfinite().all() and all(leaf.grad.isfinite().all() for leaf in leaves)
    assert kind != "js" or kl_N.max() <= 0.6932, "a Jensen-Shannon divergence is at most log 2"


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_still_do():
    inputs = draw(2, 4, 3, 3, 9)
    inputs[0].requires_grad_()
    run("torch", inputs).sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is None


@pytest.mark.parametrize("kind", ["reverse", "forward", "js"])
def test_no_tensor_of_tokens_by_vocabulary_exists(kind):
    from kernels.speed import _peak_bytes

    N, V, chunk = 256, 4096, 16
    inputs = [x.float() for x in draw(3, N, 4, 6, V)]
    leaves = [x.requires_grad_() for x in inputs[:2]]

    def call() -> None:
        run("torch", inputs, kind=kind, chunk=chunk).sum().backward()
        for leaf in leaves:
            leaf.grad = None

    assert _peak_bytes(call, "cpu") < 4 * N * V / 2


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_what_makes_no_sense_is_one_clear_sentence(name):
    inputs = draw(4, 3, 2, 2, 5)
    with pytest.raises(ValueError, match="'backward' is unknown"):
        run(name, inputs, kind="backward")
    with pytest.raises(ValueError, match=r"beta=1\.0 must lie between 0 and 1"):
        run(name, inputs, kind="js", beta=1.0)
    with pytest.raises(ValueError, match="must be the same tokens"):
        run(name, [*inputs[:3], inputs[3][:4]])
