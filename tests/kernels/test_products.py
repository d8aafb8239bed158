"""The CPU's products are the same numbers from either library, in every layout of their operands."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import _products


@pytest.fixture(autouse=True)
def through_onednn(monkeypatch):
    monkeypatch.setattr(_products, "onednn_first", lambda: True)
    monkeypatch.setattr(_products, "SMALLEST", 1)


EDGE = st.sampled_from([1, 7, 31, 32, 33, 64, 100, 128])


def operand(rows: int, columns: int, layout: str, generator: torch.Generator) -> torch.Tensor:
    """A matrix that lies in memory by rows, by columns, or as a part of a wider one in either way."""
    if layout == "rows":
        return torch.randn(rows, columns, generator=generator)
    if layout == "columns":
        return torch.randn(columns, rows, generator=generator).T
    if layout == "part of rows":
        return torch.randn(rows, columns + 13, generator=generator)[:, 5 : 5 + columns]
    return torch.randn(columns, rows + 13, generator=generator)[:, 5 : 5 + rows].T


LAYOUT = st.sampled_from(["rows", "columns", "part of rows", "part of columns"])


@settings(max_examples=150, deadline=None)
@given(EDGE, EDGE, EDGE, LAYOUT, LAYOUT, st.booleans(), st.integers(0, 99))
def test_a_product_is_the_product(M, K, N, left, right, with_out, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = operand(M, K, left, generator), operand(K, N, right, generator)
    out = torch.empty(M, N) if with_out else None
    torch.testing.assert_close(_products.mm(a, b, out=out), a @ b, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=5), EDGE, EDGE, st.integers(0, 99))
def test_grouped_products_go_group_by_group(counts, K, N, seed):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    M, E = sum(counts), len(counts)
    a, c = torch.randn(M, K, generator=generator), torch.randn(M, N, generator=generator)
    b = torch.randn(E, K, N, generator=generator)
    found, outer = torch.empty(0, N), torch.empty(E, K, N)
    if M:
        found, outer = _products.grouped_mm(a, b, ends), _products.grouped_outer(a, c, ends)
        start = 0
        for e, stop in enumerate(ends.tolist()):
            torch.testing.assert_close(found[start:stop], a[start:stop] @ b[e], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(outer[e], a[start:stop].T @ c[start:stop], rtol=1e-4, atol=1e-4)
            start = stop


def test_the_library_can_be_named(monkeypatch):
    monkeypatch.undo()
    _products.onednn_first.cache_clear()
    monkeypatch.setenv("ASCENT_CPU_PRODUCTS", "mkl")
    with pytest.raises(ValueError, match="expected blas or onednn"):
        _products.onednn_first()
    for name in ("blas", "onednn"):
        _products.onednn_first.cache_clear()
        monkeypatch.setenv("ASCENT_CPU_PRODUCTS", name)
        assert _products.onednn_first() == (name == "onednn")
    monkeypatch.undo()
    _products.onednn_first.cache_clear()


@pytest.mark.parametrize("operator", ["linear_logprob", "linear_kl"])
def test_a_bf16_head_as_devices_multiply_it_gives_logits_of_fp32_and_gradients_of_bf16(operator, monkeypatch):
    """Devices take bf16 operands as they are; a CPU makes the same numbers of them when it is told to."""
    module = importlib.import_module(f"kernels.{operator}.torch")
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(23, 16, generator=g).bfloat16()
    head = torch.randn(61, 16, generator=g).bfloat16()
    given = {
        "linear_logprob": (torch.randint(0, 61, (23,), generator=g),),
        "linear_kl": (
            torch.randn(23, 16, generator=g).bfloat16(),
            torch.randn(61, 16, generator=g).bfloat16(),
        ),
    }[operator]

    def run(dtype):
        inputs = [each.to(dtype).requires_grad_() for each in (hidden, head)]
        rest = [each.to(dtype) if each.is_floating_point() else each for each in given]
        out = getattr(module, operator)(*inputs, *rest, chunk=7)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        return out.detach(), [each.grad for each in inputs]

    exact, exact_grads = run(torch.float64)
    monkeypatch.setattr(module, "operands", lambda x, y: (x, y))
    multiplied = []
    full_mm = module.full_mm
    monkeypatch.setattr(
        module, "full_mm", lambda a, b, out=None: multiplied.append((a.dtype, b.dtype)) or full_mm(a, b, out)
    )
    found, grads = run(torch.bfloat16)
    assert set(multiplied) == {(torch.bfloat16, torch.bfloat16)}
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-5
    for ours, right in zip(grads, exact_grads, strict=True):  # rounded twice to the weights' own precision
        assert ((ours - right).norm() / right.norm()).item() < 2**-8
