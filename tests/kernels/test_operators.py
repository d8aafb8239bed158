"""Every operator against its definition: values and gradients, in fp64 on random packed rows."""

from __future__ import annotations

import pytest
import torch

from kernels import registry
from kernels._cases import draw_case, normal, variants
from kernels.conformance import TOLERANCE, compare, others, supported
from kernels.geometry import Geometry

SEEDS = range(4)
MODES = [
    (o, name, mode)
    for o, name in others(None)
    if supported(o, name, "cpu", torch.float32)
    for mode in variants(o)
]


@pytest.mark.parametrize("operator, name, mode", MODES)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_implementation_gives_the_values_and_gradients_of_the_reference(operator, name, mode, seed):
    case = draw_case(operator, seed, **mode)
    if supported(operator, name, "cpu", torch.float64):
        dtype, allowed = torch.float64, TOLERANCE[torch.float64]
    else:  # grouped products and codes know no fp64
        dtype, allowed = torch.float32, 0.0 if case.exact else 2e-6
    forward, gradient = compare(operator, name, case, dtype)
    assert forward <= allowed and (gradient or 0.0) <= allowed
    assert (gradient is not None) == bool(case.differentiable)


def test_every_operator_has_something_to_compare_with_its_reference():
    assert {operator for operator, _, _ in MODES} == set(registry.operators())


@pytest.mark.parametrize("operator", registry.operators())
def test_cases_of_two_seeds_differ_and_of_one_seed_do_not(operator):
    first, again, other = (draw_case(operator, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x.double(), again.inputs[k].double()) for k, x in first.inputs.items())
    assert any(
        x.shape != other.inputs[k].shape or not torch.equal(x.double(), other.inputs[k].double())
        for k, x in first.inputs.items()
    )


def test_shared_kv_attention_does_not_depend_on_the_chunks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    positions = torch.arange(90).expand(2, 90)
    angle = normal(g, 2, 90, 2)
    q, kv, sinks, entries = normal(g, 2, 90, 2, 8), normal(g, 2, 90, 8), normal(g, 2), normal(g, 2, 22, 8)
    outputs = []
    for elements in (1 << 20, 4000, 1):
        monkeypatch.setattr("kernels.geometry.CHUNK_ELEMENTS", elements)
        geometry = Geometry(positions, torch.zeros(2, 90).long())
        run = registry.get("shared_kv_attention")
        out, _ = run(
            q, kv, sinks, angle.cos(), angle.sin(), geometry, window=8, eps=1e-6, entries_BCK=entries, rate=4
        )
        outputs.append(out)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


def test_grouped_swiglu_names_a_width_that_grouped_products_cannot_take():
    x, experts, weights = torch.zeros(3, 6), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with pytest.raises(ValueError, match="multiple of 4"):
        registry.get("grouped_swiglu")(x, experts, weights, torch.zeros(2, 8, 6), torch.zeros(2, 6, 4), 10.0)


def test_linear_logprob_is_the_cross_entropy_of_torch():
    g = torch.Generator().manual_seed(0)
    hidden, head, targets = normal(g, 10, 6), normal(g, 11, 6), torch.randint(0, 11, (10,), generator=g)
    logprob, correct, entropy = registry.get("linear_logprob")(hidden, head, targets)
    logits = hidden @ head.T
    torch.testing.assert_close(-logprob, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(correct, logits.argmax(-1) == targets)
    assert not entropy.requires_grad


def test_routing_bias_moves_the_choice_and_never_the_weights():
    g = torch.Generator().manual_seed(0)
    x, weight, run = normal(g, 8, 6), normal(g, 5, 6), registry.get("routing")
    bias = torch.tensor([0.0, 0.0, 100.0, 0.0, 0.0])
    experts, weights = run(x, weight, k=2, scoring="sqrtsoftplus", scaling=1.5, bias_E=bias)
    assert (experts == 2).any(1).all()
    torch.testing.assert_close(weights.sum(1), torch.full((8,), 1.5, dtype=torch.float64))
    table = torch.tensor([[0, 3]]).expand(8, 2)
    hashed, by_table = run(x, weight, k=2, scoring="sqrtsoftplus", scaling=1.5, experts_Nk=table)
    scores = torch.nn.functional.softplus(x @ weight.T).sqrt()[:, [0, 3]]
    assert torch.equal(hashed, table)
    torch.testing.assert_close(by_table, 1.5 * scores / scores.sum(1, keepdim=True))
