"""Newton-Schulz: both implementations, against each other and against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import registry
from kernels.newton_schulz import torch as batched
from kernels.newton_schulz.reference import coefficients

BOTH = ("torch", "reference")


def run(name: str, g_BNM: torch.Tensor, **options: int) -> torch.Tensor:
    with registry.force(newton_schulz=name):
        return registry.get("newton_schulz", "cpu", g_BNM.dtype)(g_BNM, **options)


def with_singular_values(B: int, N: int, M: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random matrices whose singular values lie between 0.02 and 1, and their orthogonal factors; fp64."""
    g, k = torch.Generator().manual_seed(seed), min(N, M)
    u = torch.linalg.qr(torch.randn(B, N, k, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(B, M, k, generator=g, dtype=torch.float64)).Q
    sigma = torch.rand(B, 1, k, generator=g, dtype=torch.float64) * 0.98 + 0.02
    return (u * sigma) @ v.mT, u @ v.mT


@settings(max_examples=30, deadline=None)
@given(B=st.integers(1, 4), N=st.integers(1, 40), M=st.integers(1, 40), seed=st.integers(0, 999))
def test_singular_values_become_one_and_vectors_stay(B, N, M, seed):
    g_BNM, orthogonal = with_singular_values(B, N, M, seed)
    exact = run("reference", g_BNM)
    torch.testing.assert_close(run("torch", g_BNM), exact, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(exact, orthogonal, rtol=0, atol=2.1e-3)
    before = g_BNM.float()
    for name in BOTH:
        found = run(name, before)
        assert found.shape == before.shape and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
        sigma = torch.linalg.svdvals(found)
        assert sigma.min() > 0.99 and sigma.max() < 1.01
    assert torch.equal(before, g_BNM.float())


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_the_size_of_a_gradient_does_not_matter(name, size):
    g = with_singular_values(2, 6, 9, 0)[0].float()
    torch.testing.assert_close(run(name, g * size), run(name, g), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_a_zero_matrix_stays_zero_and_disturbs_no_other(name):
    g = with_singular_values(2, 5, 3, 1)[0].float()
    found = run(name, torch.cat([g, torch.zeros(1, 5, 3)]))
    assert torch.equal(found[2], torch.zeros(5, 3))
    torch.testing.assert_close(found[:2], run(name, g))


def test_in_bfloat16_singular_values_stay_near_one(monkeypatch):
    """What devices do: the iteration alone in bf16, its input and its norm in fp32."""
    monkeypatch.setattr(batched, "product_dtype", lambda g: torch.bfloat16)
    for N, M in ((64, 64), (64, 256), (256, 96)):
        g = torch.randn(2, N, M, generator=torch.Generator().manual_seed(N + M))
        sigma = torch.linalg.svdvals(run("torch", g))
        assert sigma.min() > 0.98 and sigma.max() < 1.02


def test_a_bfloat16_gradient_gives_a_bfloat16_update():
    g = with_singular_values(1, 8, 12, 2)[0].bfloat16()
    for name in BOTH:
        sigma = torch.linalg.svdvals(run(name, g).float())
        assert run(name, g).dtype == torch.bfloat16 and (sigma - 1).abs().max() < 0.02


def test_the_last_two_steps_settle():
    assert coefficients(10) == [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2
    g = with_singular_values(1, 8, 8, 3)[0]
    assert (torch.linalg.svdvals(run("torch", g, steps=5)) - 1).abs().max() < 0.2
    with pytest.raises(ValueError, match="steps=1"):
        run("torch", g, steps=1)
