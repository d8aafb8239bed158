"""``lab kernels check`` and ``bench``: every operator passes, a wrong one does not, rows keep their keys."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from kernels import conformance, registry, speed
from kernels._cases import REALISTIC, draw_case, variants
from lab_utils.bench.kernels_commands import app

WITHOUT_GRADIENT = {
    "fp8_quantize",
    "fp8_dequantize",
    "mxfp4_quantize",
    "mxfp4_dequantize",
    "indexer_select",
    "newton_schulz",
}
CHECK_KEYS = ["operator", "implementation", "device", "dtype", "forward_error", "gradient_error", "ok"]
BENCH_KEYS = [
    *("operator", "implementation", "device", "dtype", "shape", "ms", "reference_ms", "ratio"),
    *("gflops", "gbps", "peak_mib"),
]


@pytest.fixture(scope="module")
def checked() -> list[dict]:
    return conformance.check(seeds=1)


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    return speed.bench()


def test_every_operator_passes_in_fp32_and_bf16(checked):
    assert [row for row in checked if not row["ok"]] == []
    assert {row["operator"] for row in checked} == set(registry.operators())
    assert {row["dtype"] for row in checked} == {"float32", "bfloat16"}


def test_rows_of_the_check_have_their_keys_and_a_gradient_where_there_is_one(checked):
    for row in checked:
        assert list(row) == CHECK_KEYS
        assert (row["gradient_error"] is None) == (row["operator"] in WITHOUT_GRADIENT)
        assert math.isfinite(row["forward_error"])


def spoil(operator: str, monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Let the torch implementation of an operator return ``change(outputs, arguments)``."""
    module = importlib.import_module(f"kernels.{operator}.torch")
    right = getattr(module, operator)
    monkeypatch.setattr(module, operator, lambda **arguments: change(right(**arguments), arguments))


def other_code(outputs, _):
    codes, scale = outputs
    codes = codes.clone()
    codes.view(torch.uint8)[0, 0] ^= 1
    return codes, scale


def worst_last(selected, _):
    """The first entry of each query's selection is none at all."""
    selected = selected.clone()
    selected[..., 0] = -1
    return selected


def latest_ties(selected_BTS, arguments):
    """Of entries that score zero the last, not the first, are taken."""
    from kernels.indexer_select.reference import scores

    rate, geometry = arguments["rate"], arguments["geometry"]
    names = ("q_BTHK", "keys_BCK", "weights_BTH")
    found = scores(*(arguments[name] for name in names), geometry, rate)
    place_C = torch.arange(found.shape[-1], dtype=found.dtype)
    values, index = torch.where(found == 0, place_C * 1e-30, found).topk(selected_BTS.shape[-1], -1)
    return torch.where(values == float("-inf"), -1, index)


class ScaledGradient(torch.autograd.Function):
    """The right values, and 1.1 times the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.1


WRONG = {
    "off by a thousandth": ("rms_norm", lambda y, _: y * 1.001, {"float32"}),
    "another dtype": ("rms_norm", lambda y, _: y.double(), {"float32", "bfloat16"}),
    "another shape": ("rope", lambda y, _: y[..., :1], {"float32", "bfloat16"}),
    "no gradient": ("rope", lambda y, _: y.detach(), {"float32", "bfloat16"}),
    "a wrong gradient": ("linear_kl", lambda y, _: ScaledGradient.apply(y), {"float32", "bfloat16"}),
    "memory never written": ("rms_norm", lambda y, _: torch.empty_like(y) + 0 * y, {"float32", "bfloat16"}),
    "one bit of one code": ("fp8_quantize", other_code, {"float32", "bfloat16"}),
    "an entry left out": ("indexer_select", worst_last, {"float32", "bfloat16"}),
    "ties taken from the end": ("indexer_select", latest_ties, {"float32", "bfloat16"}),
    "another expert": ("routing", lambda y, _: ((y[0] + 1) % y[2].shape[1], *y[1:]), {"float32", "bfloat16"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_implementation_is_found(what, monkeypatch):
    operator, change, expected = WRONG[what]
    spoil(operator, monkeypatch, change)
    told: list[str] = []
    rows = conformance.check([operator], seeds=3, say=told.append)
    assert {row["dtype"] for row in rows if not row["ok"]} == expected
    assert told and all(text.startswith(f"{operator}/torch") for text in told)


def test_what_an_implementation_raises_is_told_and_not_ok(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such instruction")

    spoil("rope", monkeypatch, broken)
    told: list[str] = []
    rows = conformance.check(["rope"], seeds=1, say=told.append)
    assert [row["ok"] for row in rows] == [False, False] and rows[0]["forward_error"] is None
    assert "no such instruction" in told[0]


def test_the_check_leaves_torch_as_it_found_it():
    filled = torch.utils.deterministic.fill_uninitialized_memory
    conformance.check(["rope"], seeds=1)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


def test_the_command_prints_rows_and_exits_1_only_where_one_is_wrong(monkeypatch):
    words = ["check", "--operator", "rope", "--operator", "rms_norm", "--seeds", "1", "--json"]
    done = CliRunner().invoke(app, words)
    rows = json.loads(done.stdout)
    assert done.exit_code == 0 and all(row["ok"] for row in rows)
    assert [row["operator"] for row in rows] == ["rope", "rope", "rms_norm", "rms_norm"]
    spoil("rope", monkeypatch, lambda y, _: -y)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert [row["ok"] for row in json.loads(done.stdout)] == [False, False, True, True]
    done = CliRunner().invoke(app, words[:-1])
    assert done.exit_code == 1 and "1e-05" in done.stdout and "0.02 in bfloat16" in done.stdout


def test_every_row_of_the_bench_has_its_keys_and_finite_positive_numbers(measured):
    assert [row["operator"] for row in measured] == registry.operators()
    for row in measured:
        assert list(row) == BENCH_KEYS and row["shape"] and row["dtype"] == "float32"
        for key in BENCH_KEYS[5:]:
            if key != "gflops" or row[key] is not None:
                assert math.isfinite(row[key]) and row[key] > 0, (row["operator"], key)
        assert row["ratio"] == pytest.approx(row["reference_ms"] / row["ms"])
    products = {row["operator"] for row in measured if row["gflops"] is not None}
    assert {"linear_kl", "grouped_swiglu", "shared_kv_attention", "newton_schulz"} <= products
    assert not products & {"rope", "rms_norm", "fp8_quantize", "expert_dispatch"}


def test_the_bench_takes_the_realistic_size_of_the_first_variant(measured):
    (row,) = (row for row in measured if row["operator"] == "linear_kl")
    shape = draw_case("linear_kl", 0, REALISTIC, **variants("linear_kl")[0]).shape
    assert row["shape"] == " ".join(f"{letter}={size}" for letter, size in shape.items())


def test_flops_and_bytes_of_a_known_product(monkeypatch):
    monkeypatch.setattr(speed, "_time", lambda calls, device: [1.0, 2.0])
    (row,) = speed.bench(["linear_logprob"])
    N, D, V = 256, 256, 8192
    assert row["ratio"] == 2.0 and row["gflops"] == pytest.approx(6 * N * D * V / 1e6)
    inputs, outputs = 4 * (N * D + V * D) + 8 * N, 4 * N + N + 4 * N
    assert row["gbps"] == pytest.approx((inputs + outputs + inputs + 4 * N + 4 * (N * D + V * D)) / 1e6)


def test_a_call_that_holds_two_buffers_at_once_peaks_at_two():
    def call() -> None:
        first = torch.empty(1 << 18)
        second = torch.empty(1 << 18)
        del first, second
        torch.empty(1 << 18)

    assert speed._peak_bytes(call, "cpu") == 2 << 20


def test_an_operator_without_cases_is_one_clear_sentence(monkeypatch):
    monkeypatch.setattr(registry, "implementations", lambda operator: ["torch", "reference"])
    with pytest.raises(ValueError, match=r"nothing has no cases\.py"):
        conformance.check(["nothing"])
