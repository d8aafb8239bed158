"""FP8 and MXFP4: every code and every scale, the rule for a block's scale, edges, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import registry
from kernels.fp8_quantize.scales import E2M1, decode

KINDS = ("fp8", "mxfp4")
BOTH = ("torch", "reference")
DTYPES = (torch.bfloat16, torch.float32)


def run(operator: str, implementation: str, *arguments, **options):
    with registry.force(**{operator: implementation}):
        return registry.get(operator, "cpu", torch.float32)(*arguments, **options)


def e8m0(codes) -> torch.Tensor:
    return torch.as_tensor(codes, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Tensors of codes, and zeros of either sign, compared as they are stored."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def random_matrix(seed: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of many magnitudes, with zeros of either sign and whole blocks of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.randint(-9, 9, (rows, columns), generator=g).exp2()
    x[torch.rand(x.shape, generator=g) < 0.1] = 0.0
    x[: rows // 2, : min(columns, 128)] *= -0.0
    return (x * 2.0 ** int(torch.randint(-100, 100, (1,), generator=g))).to(dtype)


def test_all_scales_decode_to_their_power_of_two_and_255_is_refused():
    expected = torch.tensor([2.0 ** (b - 127) for b in range(255)], dtype=torch.float64)
    assert torch.equal(decode(e8m0(range(255))).double(), expected)
    assert torch.equal(decode(torch.arange(255, dtype=torch.uint8)).double(), expected)
    for scale in (e8m0([255]), torch.tensor([0.0]), torch.tensor([-1.0]), torch.tensor([math.inf])):
        with pytest.raises(ValueError, match="not a positive number"):
            decode(scale)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fp4_code_with_every_scale_is_exact(implementation, dtype):
    pairs = torch.arange(256, dtype=torch.uint8)  # all sixteen codes in either half of a byte
    for byte in range(255):
        scale = e8m0(torch.full((256, 1), byte))
        if byte > 252:  # 6·2^126 is out of range in either dtype
            with pytest.raises(ValueError, match="does not fit"):
                run("mxfp4_dequantize", implementation, pairs[:, None].view(torch.int8), scale, dtype)
            continue
        found = run("mxfp4_dequantize", implementation, pairs[:, None].view(torch.int8), scale, dtype)
        values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64) * 2.0 ** (byte - 127)
        expected = torch.stack([values.repeat(16), values.repeat_interleave(16)], -1)
        assert torch.equal(found.double(), expected)
        assert torch.equal(torch.signbit(found), torch.signbit(expected))


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fp8_code_with_every_scale_is_exact(implementation, dtype):
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)[None]
    codes = codes.view(torch.float8_e4m3fn)
    smallest = 3 if dtype == torch.bfloat16 else 0  # below, 2^-9 times the scale is no bfloat16
    for byte in range(255):
        scale = e8m0(torch.full((1, 2), byte))
        if byte > 246:
            with pytest.raises(ValueError, match="does not fit"):
                run("fp8_dequantize", implementation, codes, scale, dtype)
        elif byte >= smallest:
            found = run("fp8_dequantize", implementation, codes, scale, dtype)
            assert torch.equal(found.double(), codes.double() * 2.0 ** (byte - 127))
    for nan in (0x7F, 0xFF):
        broken = torch.tensor([[nan]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        with pytest.raises(ValueError, match="NaN"):
            run("fp8_dequantize", implementation, broken, e8m0([[127]]), dtype)


@pytest.mark.parametrize("implementation", BOTH)
def test_the_first_of_two_packed_numbers_is_the_low_half(implementation):
    codes, scale = run("mxfp4_quantize", implementation, torch.tensor([[6.0, -0.5, 1.0, 3.0]]))
    assert codes.view(torch.uint8).tolist() == [[0x97, 0x52]] and scale.view(torch.uint8).tolist() == [[127]]


@pytest.mark.parametrize("implementation", BOTH)
def test_numbers_half_way_go_to_the_even_code(implementation):
    halves = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]])
    codes, _ = run("mxfp4_quantize", implementation, halves)
    values = run("mxfp4_dequantize", implementation, codes, e8m0([[127]]), torch.float32)
    assert values.tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]]
    between = torch.tensor([[448.0, 1.0625, 1.1875, 2**-10, 3 * 2**-10, -(2**-10)]])
    codes, _ = run("fp8_quantize", implementation, between)
    assert codes.float().tolist() == [[448.0, 1.0, 1.25, 0.0, 2**-8, -0.0]]


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("kind, reach, top", [("fp8", 464.0, 448.0), ("mxfp4", 7.0, 6.0)])
def test_the_scale_is_the_smallest_power_of_two_that_reaches_the_largest_number(
    implementation, kind, reach, top
):
    for exponent in (-100, -1, 0, 5, 90):
        for size, shift in ((reach, 0), (math.nextafter(reach, math.inf) * (1 + 2**-20), 1), (reach / 2, -1)):
            x = torch.tensor([[size, 0.0]]) * 2.0**exponent
            codes, scale = run(f"{kind}_quantize", implementation, x)
            assert decode(scale).item() == 2.0 ** (exponent + shift)
        saturated = run(f"{kind}_dequantize", implementation, codes, scale, torch.float32)
        assert saturated[0, 0].item() == top * 2.0 ** (exponent - 1)
    _, scale = run(f"{kind}_quantize", implementation, torch.zeros(1, 2))
    assert decode(scale).item() == 1.0


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 5, 127, 128, 129, 200, 257]),
    columns=st.sampled_from([2, 30, 32, 34, 126, 128, 130, 200, 256, 258]),
    dtype=st.sampled_from(DTYPES),
)
def test_torch_is_the_reference_and_the_rule_is_a_fixed_point(kind, seed, rows, columns, dtype):
    x = random_matrix(seed, rows, columns, dtype)
    codes, scale = run(f"{kind}_quantize", "torch", x)
    expected, expected_scale = run(f"{kind}_quantize", "reference", x)
    assert codes.shape == expected.shape and torch.equal(bits(codes), bits(expected))
    assert scale.shape == expected_scale.shape and torch.equal(bits(scale), bits(expected_scale))

    values = run(f"{kind}_dequantize", "torch", codes, scale, dtype)
    assert values.shape == x.shape
    assert torch.equal(bits(values), bits(run(f"{kind}_dequantize", "reference", codes, scale, dtype)))
    error = (values.double() - x.double()).abs()
    worst = 2**-4 if kind == "fp8" else 2**-2
    unit = decode(scale).double()
    size = 128 if kind == "fp8" else 1
    unit = unit.repeat_interleave(size, 0)[:rows].repeat_interleave(128 if kind == "fp8" else 32, 1)
    assert (error <= worst * x.double().abs() + unit[:, :columns] * (2**-10 if kind == "fp8" else 0.25)).all()

    again, again_scale = run(f"{kind}_quantize", "torch", values)
    assert torch.equal(bits(again), bits(codes)) and torch.equal(bits(again_scale), bits(scale))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), first=st.integers(0, 127), rows=st.sampled_from([1, 100, 128, 300]))
def test_rows_from_within_a_block_are_those_of_the_whole_matrix(seed, first, rows):
    codes, scale = run("fp8_quantize", "torch", random_matrix(seed, 500, 130, torch.float32))
    whole = run("fp8_dequantize", "torch", codes, scale, torch.float32)
    stop = first + rows
    part, kept = codes[first:stop], scale[: -(-stop // 128)]
    for implementation in BOTH:
        found = run("fp8_dequantize", implementation, part, kept, torch.float32, first_row=first)
        assert torch.equal(found, whole[first:stop])


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_given_scales_are_used_and_what_they_cannot_reach_saturates(implementation, kind):
    x = torch.tensor([[1.0, -2.0, 3.0, 1e6]])
    scale = e8m0([[125]])
    codes, used = run(f"{kind}_quantize", implementation, x, scale)
    assert torch.equal(bits(used), bits(scale))
    values = run(f"{kind}_dequantize", implementation, codes, scale, torch.float32)[0].tolist()
    assert values == ([1.0, -2.0, 3.0, 112.0] if kind == "fp8" else [1.0, -1.5, 1.5, 1.5])
    codes, _ = run("fp8_quantize", implementation, torch.tensor([[0.3, 0.6]]), torch.tensor([[0.3]]))
    assert codes.float().tolist() == [[1.0, 2.0]]  # base models: any fp32 scale


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_place_in_a_block_is_refused(implementation, kind):
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="infinite or NaN"):
            run(f"{kind}_quantize", implementation, torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="scales have shape"):
        run(f"{kind}_quantize", implementation, torch.ones(4, 4), e8m0(torch.full((9, 9), 127)))
    codes, scale = run(f"{kind}_quantize", implementation, torch.ones(4, 4))
    with pytest.raises(ValueError, match="scales have shape"):
        run(f"{kind}_dequantize", implementation, codes, scale.repeat(3, 1), torch.float32)
    with pytest.raises(ValueError, match="not a positive number"):
        run(f"{kind}_dequantize", implementation, codes, e8m0(torch.full(scale.shape, 255)), torch.float32)
    with pytest.raises(ValueError, match="are odd"):
        run("mxfp4_quantize", implementation, torch.ones(2, 3))


def test_a_device_without_8_bit_floats_is_told_so():
    with pytest.raises(ValueError, match="npu has no 8-bit floats"):
        registry.get("fp8_quantize", "npu", torch.bfloat16)
