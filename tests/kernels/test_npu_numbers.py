"""The Ascend implementations with each fused operator replaced by its documented formula, against the definitions.

Shows that layouts, masks, merging and hand-written gradients around the fused calls are right, given that the operators
do what their documents say. It does not show that they do.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from kernels import _npu, _npu_cases, _npu_sparse_mla, registry
from kernels._cases import Case, between, draw_case, normal, packed, variants
from kernels._npu_check import watched
from kernels._npu_formulas import FORMULAS
from kernels.conformance import TOLERANCE, compare
from kernels.indexer_select.cases import selection

OPERATORS = [name for name in registry.operators() if "npu" in registry.implementations(name)]
OF_TORCH_NPU = {name: formula for name, formula in FORMULAS.items() if name.startswith("npu::")}
MODES = [(name, mode) for name in OPERATORS for mode in variants(name)]
# What the operators of torch_npu do where CANN's extension is not installed.
WITHOUT_EXTENSION = [(name, mode) for name, mode in MODES if name in ("indexer_kl", "shared_kv_attention")]
WITH_FUSED = {
    *(
        "rms_norm",
        "rope",
        "indexer_select",
        "indexer_kl",
        "shared_kv_attention",
        "routing",
        "expert_dispatch",
    ),
    *("expert_combine", "grouped_swiglu", "hyper_connection_pre", "hyper_connection_post", "linear_logprob"),
}


@pytest.fixture
def unsaid(monkeypatch):
    """Nothing has been said yet."""
    monkeypatch.setattr(_npu, "_said", set())


def module(operator: str):
    return importlib.import_module(f"kernels.{operator}.npu")


def test_every_operator_that_has_a_fused_one_is_here():
    assert set(OPERATORS) == WITH_FUSED
    for name in OPERATORS:
        assert module(name).OPERATORS and set(module(name).OPERATORS) <= set(FORMULAS)


@pytest.mark.parametrize("operator, mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_are_the_references_in_fp64(operator, mode, seed):
    with _npu.replaced(FORMULAS):
        forward, gradient = compare(operator, "npu", draw_case(operator, seed, **mode), torch.float64)
    assert max(forward, gradient or 0.0) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("operator, mode", WITHOUT_EXTENSION)
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_are_the_references_without_the_extension(operator, mode, seed):
    with _npu.replaced(OF_TORCH_NPU):
        forward, gradient = compare(operator, "npu", draw_case(operator, seed, **mode), torch.float64)
    assert max(forward, gradient or 0.0) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", _npu.HALVES[:1])
def test_values_and_gradients_are_the_references_in_bf16(operator, dtype):
    case = draw_case(operator, 5, **variants(operator)[0])
    with _npu.replaced(FORMULAS):
        forward, gradient = compare(operator, "npu", case, dtype)
    assert max(forward, gradient or 0.0) <= TOLERANCE[dtype]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_fused_operator_of_an_implementation_is_really_called(operator):
    expected = set(module(operator).OPERATORS)
    table = OF_TORCH_NPU if operator in ("indexer_kl", "shared_kv_attention") else FORMULAS
    with _npu.replaced(table), watched() as (called, _):
        for mode in variants(operator):
            for seed in range(2):
                compare(operator, "npu", draw_case(operator, seed, **mode), torch.float64)
    assert called == expected


@pytest.mark.parametrize("seed", range(6))
def test_a_selection_without_ties_is_the_fused_operators_own(seed):
    g = torch.Generator().manual_seed(seed)
    B, T, H, K = between(g, 1, 3), between(g, 3, 90), between(g, 1, 3), 4
    rate = between(g, 2, 6)
    rows = packed(g, B, T, max(2, T))
    inputs = {
        "q_BTHK": normal(g, B, T, H, K),
        "keys_BCK": normal(g, B, T // rate, K),
        # Scores of one sign and none zero: every query has its own best entries.
        "weights_BTH": normal(g, B, T, H).abs() + 0.1,
    }
    inputs["q_BTHK"][..., 0], inputs["keys_BCK"][..., 0] = 30.0, inputs["keys_BCK"][..., 0].abs() + 1
    options = {"geometry": rows, "rate": rate, "topk": between(g, 1, 12)}
    case = Case(inputs, options, view=selection)
    with _npu.replaced(FORMULAS), watched() as (called, reasons):
        forward, _ = compare("indexer_select", "npu", case, torch.float64)
    assert forward == 0.0 and not reasons
    assert called or not T // rate or not (rows.geometry().entries(rate).visible_BT > 0).any()


def test_a_choice_among_zeros_is_made_by_order_and_said():
    case = draw_case("indexer_select", 1, topk=1)
    with _npu.replaced(FORMULAS), watched() as (called, reasons):
        forward, _ = compare("indexer_select", "npu", case, torch.float64)
    assert forward == 0.0 and called and any("score zero" in reason for reason in reasons)


FITTING = [
    (name, label, case, table)
    for name in OPERATORS
    for label, case in _npu_cases.fitting(name)
    for table in (FORMULAS, OF_TORCH_NPU)
    if set(module(name).OPERATORS) <= set(table)
]


@pytest.mark.parametrize(
    "operator, label, case, table",
    FITTING,
    ids=lambda x: x if isinstance(x, str) else str(len(x)) if isinstance(x, dict) else "case",
)
def test_what_a_chip_is_checked_with_is_within_the_limits_and_right_in_bf16(
    operator, label, case, table, unsaid
):
    # On a CPU the comparison asks for determinism; on a chip it doesn't.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        with _npu.replaced(table, limits=True), watched() as (called, reasons):
            forward, gradient = compare(operator, "npu", case, torch.bfloat16)
    assert called and not {reason for reason in reasons if "sparse_flash_mla" not in reason}
    assert max(forward, gradient or 0.0) <= TOLERANCE[torch.bfloat16]


# -- CANN's sparse_flash_mla, which takes V4's own sizes only ------------------------------------------------------


@pytest.mark.parametrize("mode", variants("shared_kv_attention"))
def test_attention_goes_to_the_extension_where_it_is_installed(mode):
    with _npu.replaced(FORMULAS), watched() as (called, _):
        compare("shared_kv_attention", "npu", draw_case("shared_kv_attention", 2, **mode), torch.float64)
    by_extension = bool(called & set(_npu_sparse_mla.OPERATORS))
    assert by_extension == ("ranks" not in mode)  # parts of rows go to torch_npu's own
    if by_extension:
        assert called == {*_npu_sparse_mla.OPERATORS, "npu::npu_rms_norm", "npu::npu_rotary_mul"}
    else:
        assert "npu::npu_fusion_attention_grad" in called


def test_attention_that_the_extension_does_not_take_goes_to_torch_npu(unsaid):
    case = draw_case("shared_kv_attention", 2, rate=None)
    with _npu.replaced(FORMULAS, limits=True), watched() as (called, reasons):
        module("shared_kv_attention").shared_kv_attention(**case.arguments(torch.float32))
    assert "npu::npu_fusion_attention" in called and not called & set(_npu_sparse_mla.OPERATORS)
    assert reasons == {"sparse_flash_mla takes a window of 128 and 512 channels"}


# -- limits, choice and what is said ---------------------------------------------------------------------------------


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "kernels"]


BEYOND = {
    "rope": {},
    "indexer_select": {"topk": 5},
    "indexer_kl": {"topk": 5},
    "shared_kv_attention": {"rate": 4, "topk": 3},
    "routing": {"scoring": "sqrtsoftplus"},
    "hyper_connection_pre": {"n": 2},
}


@pytest.mark.parametrize("operator", BEYOND)
def test_a_call_beyond_the_limits_falls_back_and_says_so_exactly_once(operator, caplog, unsaid, monkeypatch):
    monkeypatch.setattr("kernels.rope.npu._heads", lambda x, angle: 1000)
    case, run = draw_case(operator, 0, **BEYOND[operator]), module(operator)
    given = [case.arguments(torch.float32) for _ in range(3)]
    expected = getattr(importlib.import_module(f"kernels.{operator}.torch"), operator)(**given[0])
    with (
        caplog.at_level(logging.WARNING, "kernels"),
        _npu.replaced(FORMULAS, limits=True),
        watched() as (called, _),
    ):
        found = [getattr(run, operator)(**arguments) for arguments in given[1:]]
    assert not called
    for outputs in found:
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (outputs, expected)), strict=True):
            assert a is b or torch.equal(a, b)
    (text,) = warnings_of(caplog)
    assert text.startswith(f"kernels: {operator} runs without its fused Ascend operator: ")


@pytest.mark.parametrize("operator", ["indexer_kl", "shared_kv_attention"])
def test_a_gradient_in_no_fixed_order_is_not_taken_where_determinism_is_asked_for(
    operator, unsaid, monkeypatch
):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    beyond, why = _npu.undetermined(operator)
    assert beyond and f"ASCENT_KERNELS={operator}=npu" in why
    monkeypatch.setenv("ASCENT_KERNELS", f"{operator}=npu")
    assert not _npu.undetermined(operator)[0]
    monkeypatch.delenv("ASCENT_KERNELS")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert not _npu.undetermined(operator)[0]


def test_given_experts_fall_back_where_the_installed_operator_takes_no_table(caplog, unsaid, monkeypatch):
    case = draw_case("routing", 3, scoring="sigmoid", given=True)
    with caplog.at_level(logging.WARNING, "kernels"), _npu.replaced(FORMULAS), watched() as (called, _):
        with_table = module("routing").routing(**case.arguments(torch.float64))
        monkeypatch.setattr(_npu, "takes", lambda operator, argument: argument != "tid2eid")
        before = set(called)
        without = module("routing").routing(**case.arguments(torch.float64))
    assert before == called == {"npu::npu_moe_gating_top_k"}
    for a, b in zip(with_table, without, strict=True):
        torch.testing.assert_close(a, b)
    assert len(warnings_of(caplog)) == 1 and "2.13" in warnings_of(caplog)[0]


def test_within_the_limits_nothing_is_said(caplog, unsaid):
    case = draw_case("rope", 0)
    with (
        caplog.at_level(logging.WARNING, "kernels"),
        _npu.replaced(FORMULAS, limits=True),
        watched() as (called, _),
    ):
        module("rope").rope(**case.arguments(torch.float32))
    assert called and not warnings_of(caplog)


def test_without_torch_npu_the_next_implementation_is_taken_and_the_reason_given():
    assert not any(name.split(".")[0] == "torch_npu" for name in sys.modules)
    for operator in OPERATORS:
        on_cpu = registry.explain(operator, "cpu", torch.float32)
        assert on_cpu["implementation"] == "torch" and "npu: runs on npu only" in on_cpu["reason"]
        on_npu = registry.explain(operator, "npu", torch.bfloat16)
        assert on_npu["implementation"] == "torch" and "torch_npu is not imported" in on_npu["reason"]


@pytest.fixture
def chip(monkeypatch):
    """A process that has torch_npu and a chip of this name."""

    def answer(soc: str) -> None:
        monkeypatch.setattr(torch, "npu", SimpleNamespace(get_device_name=lambda: soc), raising=False)
        _npu.product.cache_clear()

    yield answer
    _npu.product.cache_clear()


@pytest.mark.parametrize(
    "soc, product, why",
    [
        ("Ascend910B3", "A2", None),
        ("Ascend910_9391", "A3", None),
        ("Ascend950PR_9599", "950", "npu::npu_grouped_matmul is for A2 and A3, not for 950"),
        ("Ascend310P3", "Ascend310P3", "npu::npu_grouped_matmul is for A2 and A3, not for Ascend310P3"),
    ],
)
def test_products_are_told_by_the_name_of_the_chip(soc, product, why, chip, monkeypatch):
    chip(soc)
    monkeypatch.setattr(_npu, "has", lambda operator: True)
    assert _npu.product() == product
    assert module("grouped_swiglu").unsupported("npu", torch.bfloat16) == why


def test_dtypes_that_an_operator_does_not_take_are_named(chip, monkeypatch):
    chip("Ascend910_9391")
    monkeypatch.setattr(_npu, "has", lambda operator: True)
    assert module("rms_norm").unsupported("npu", torch.float64) == "npu::npu_rms_norm takes no float64"
    why = module("indexer_select").unsupported("npu", torch.float32)
    assert why == "npu::npu_lightning_indexer takes no float32"


def test_an_operator_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(
        torch, "npu", SimpleNamespace(get_device_name=lambda: "Ascend910_9391"), raising=False
    )
    why = module("hyper_connection_post").unsupported("npu", torch.bfloat16)
    assert why == "cann_ops_transformer::mhc_post is not installed"
    assert module("rope").unsupported("npu", torch.bfloat16) == "npu::npu_rotary_mul is not installed"


# -- planted errors --------------------------------------------------------------------------------------------------


PLANTED = {
    "an angle of the other sign": (
        "rope",
        "npu::npu_rotary_mul",
        lambda f: lambda x, c, s, m: f(x, c, -s, m),
    ),
    "halves for pairs": ("rope", "npu::npu_rotary_mul", lambda f: lambda x, c, s, m: f(x, c, s, "half")),
    "another alpha": (
        "grouped_swiglu",
        "npu::npu_clipped_swiglu",
        lambda f: lambda x, **k: f(x, **{**k, "alpha": 1.702}),
    ),
    "gradients of keys left out": (
        "shared_kv_attention",
        "npu::npu_fusion_attention_grad",
        lambda f: lambda *a, **k: (lambda q, key, value, *rest: (q, 0 * key, value, *rest))(*f(*a, **k)),
    ),
    "one entry too many": (
        "indexer_select",
        "npu::npu_lightning_indexer",
        lambda f: lambda *a, **k: (f(*a, **k)[0] + 1, f(*a, **k)[1]),
    ),
    "a loss of the other sign": (
        "linear_logprob",
        "npu::npu_cross_entropy_loss_backward",
        lambda f: lambda *a, **k: -f(*a, **k),
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_error_of_a_fused_operator_is_found(what):
    operator, name, spoil = PLANTED[what]
    with _npu.replaced({**OF_TORCH_NPU, name: spoil(FORMULAS[name])}):
        worst = max(
            max(found[0], found[1] or 0.0)
            for mode in variants(operator)
            for seed in range(2)
            for found in [compare(operator, "npu", draw_case(operator, seed, **mode), torch.float64)]
        )
    assert worst > 1e-3
