"""The balance bias follows V3's rule over the whole batch, and the sequence loss is V3's for each document."""

from __future__ import annotations

import pytest
import torch
from v4_models import build, documents, gradients, relative, row

from lab_utils.telemetry import names
from lab_utils.telemetry.reductions import reduce_metrics

LENGTHS = [9, 1, 14, 3]


def alone(load_LE):
    return load_LE


def counted(model, rows) -> torch.Tensor:
    """Tokens of each expert in each layer that learns to route ``[L, E]``: token by token, without padding."""
    with model.record_routing() as record, torch.no_grad():
        model(**rows)
    layers = [*model.model.layers, *model.mtp]
    found = []
    for layer, experts in zip(layers, record.experts, strict=True):
        if layer.mlp.gate.hashed:
            continue
        load = [0] * model.config.n_routed_experts
        owners = rows["document_ids"].flatten().tolist()
        for token, chosen in enumerate(experts.tolist()):
            last = token + 1 == len(owners) or owners[token + 1] != owners[token]
            if owners[token] >= 0 and not (last and layer in list(model.mtp)):  # MTP: there is no next token
                for expert in chosen:
                    load[expert] += 1
        found.append(load)
    return torch.tensor(found)


def biases(model) -> torch.Tensor:
    return torch.stack([b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]).clone()


@pytest.mark.parametrize("options", [{}, {"checkpointing": "full"}, {"mtp_loss": 0.3}])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_bias_moves_towards_the_mean_load_of_all_ranks_and_micro_batches(seed, options):
    one, two = (build(seed, balance_rate=0.001, **options) for _ in range(2))
    before, load = biases(one), 0
    calls = []
    for step, (model, micro) in enumerate([(one, 2), (two, 1)]):
        for i in range(micro):
            rows = row(documents(10 * seed + 3 * step + i, LENGTHS), padding=5)
            load = load + counted(model, rows)
            output = model(**rows)
            total = output.hidden_BTD.square().sum() + sum(a.total for a in output.auxiliary.values())
            total.backward()  # with recomputation, the layers run again here
    parts = [torch.stack([m.mlp.gate.load_E for m in _learned(model)]) for model in (one, two)]
    assert torch.equal(sum(parts), load)

    def all_reduce(load_LE):
        calls.append(load_LE.shape)
        return sum(parts)

    metrics = one.finish_step(all_reduce, True)
    expected = before.clone()
    for layer, row_E in enumerate(load.tolist()):
        mean = sum(row_E) / len(row_E)
        for expert, tokens in enumerate(row_E):
            expected[layer, expert] += 0.001 * ((mean > tokens) - (mean < tokens))
    assert torch.allclose(biases(one), expected, atol=1e-9, rtol=0)
    assert not torch.equal(expected, before)
    assert calls == [load.shape]
    assert all(not m.mlp.gate.load_E.any() for m in _learned(one))

    load = load.double()
    mean = load.mean(1)
    share = load / load.sum(1, keepdim=True)
    even = torch.special.entr(share).sum(1).exp() / load.shape[1]
    cv = load.std(1, correction=0) / mean
    values = {key: metric.value for key, metric in reduce_metrics([metrics]).items()}
    assert values == {
        "moe/cv_mean": pytest.approx(cv.mean().item(), rel=1e-5),
        "moe/cv_max": pytest.approx(cv.max().item(), rel=1e-5),
        "moe/max_violation": pytest.approx((load.amax(1) / mean).max().item() - 1, rel=1e-5),
        "moe/dead_expert_frac_mean": pytest.approx((load == 0).double().mean().item()),
        "moe/expert_diversity_mean": pytest.approx(even.mean().item(), rel=1e-5),
        "moe/bias_norm": pytest.approx(expected.norm(dim=1).mean().item(), rel=1e-5),
    }
    assert all(names.lookup(key) for key in values)


def _learned(model):
    return [block for block in [*model.model.layers, *model.mtp] if not block.mlp.gate.hashed]


def test_an_expert_at_the_mean_stays_and_a_skipped_step_moves_nothing():
    model = build(2, balance_rate=0.01)
    E, before = model.config.n_routed_experts, biases(model)
    for layer in _learned(model):
        layer.mlp.gate.load_E.copy_(torch.arange(E) if E % 2 else torch.tensor([1, 3, 2, 2, 2, 2, 2, 2]))
    model.finish_step(alone, False)
    assert torch.equal(biases(model), before)
    assert all(not layer.mlp.gate.load_E.any() for layer in _learned(model))
    for layer in _learned(model):
        layer.mlp.gate.load_E.copy_(torch.arange(E) if E % 2 else torch.tensor([1, 3, 2, 2, 2, 2, 2, 2]))
    model.finish_step(alone, True)
    moved = (biases(model) - before) / 0.01
    expected = [1, 1, 0, -1, -1] if E == 5 else [1, -1, 0, 0, 0, 0, 0, 0]
    assert torch.allclose(moved, torch.tensor(expected).float().expand_as(moved), atol=1e-3)


def test_rate_zero_measures_and_moves_nothing():
    model = build(3)
    before = biases(model)
    model(**row(documents(3, LENGTHS)))
    assert model.finish_step(alone, True)["moe/max_violation"].value > 0
    assert torch.equal(biases(model), before)


def test_evaluation_and_passes_without_gradient_count_nothing():
    model = build(4)
    rows = row(documents(4, LENGTHS))
    with torch.no_grad():
        model(**rows)
    model.eval()(**rows)
    assert all(not layer.mlp.gate.load_E.any() for layer in _learned(model))


def test_biases_stay_fp32_and_are_saved_and_counts_are_not():
    model = build(5, balance_rate=0.001).to(torch.bfloat16)
    model(**row(documents(5, LENGTHS)))
    model.finish_step(alone, True)
    state = model.state_dict()
    kept = [tensor for name, tensor in state.items() if name.endswith("e_score_correction_bias")]
    assert len(kept) == 2 and all(tensor.dtype == torch.float32 for tensor in kept)
    assert not any("load_E" in name for name in state)
    again = build(6).to(torch.bfloat16)
    assert not torch.equal(biases(again), biases(model))
    again = build(5)
    again.load_state_dict(state)
    assert torch.equal(biases(again), biases(model))


def direct_loss(model, rows, gates) -> torch.Tensor:
    """V3's sequence loss by loops: Σ over layers, documents and experts of f·P, from the gates' inputs."""
    total = torch.zeros(())
    owners = rows["document_ids"].flatten()
    for block, (x_ND, experts_Nk) in gates.items():
        weight, (_, k) = block.mlp.gate.weight, experts_Nk.shape
        scores = torch.log1p(torch.exp(x_ND @ weight.T)).sqrt()
        for owner in owners[owners >= 0].unique():
            tokens = (owners == owner).nonzero().flatten()
            tokens = tokens[:-1] if block in list(model.mtp) else tokens
            if len(tokens) == 0:
                continue
            shares = scores[tokens] / scores[tokens].sum(1, keepdim=True)
            E, T = scores.shape[1], len(tokens)
            for e in range(E):
                f = E / (k * T) * (experts_Nk[tokens] == e).sum()
                total = total + f * shares[:, e].mean()
    return total


def with_gates(model, rows):
    """The output of a pass, and what each learned gate saw and chose."""
    gates, hooks = {}, []
    for block in _learned(model):
        keep = lambda _m, inputs, out, b=block: gates.__setitem__(b, (inputs[0], out.experts_Nk))  # noqa: E731
        hooks.append(block.mlp.gate.register_forward_hook(keep))
    output = model(**rows)
    for hook in hooks:
        hook.remove()
    return output, gates


@pytest.mark.parametrize("seed, options", [(0, {}), (1, {}), (2, {"mtp_loss": 0.3})])
def test_the_sequence_loss_and_its_gradient_are_those_of_the_formula(seed, options):
    model = build(seed, balance_loss=1e-4, **options)
    rows = row(documents(seed, LENGTHS), padding=5)
    output, gates = with_gates(model, rows)
    found, layers = output.auxiliary["aux_loss"], len(_learned(model))
    expected = direct_loss(model, rows, gates)
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    # Weighted like V3's: a mean over documents, added up over layers.
    mean = (found.weight * found.total / found.count).item()
    assert mean == pytest.approx(1e-4 * expected.item() / len(LENGTHS), rel=1e-5)
    assert found.count == len(LENGTHS) * layers
    known = model.auxiliary_counts(rows["position_ids"], rows["document_ids"], rows["loss_weights"])
    assert known["aux_loss"] == found.count
    model.zero_grad()
    expected.backward(retain_graph=True)
    theirs = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    ours = gradients(model, found.total)
    for name, gradient in theirs.items():
        if gradient.abs().sum() > 0:
            assert relative(ours[name], gradient) < 1e-3, name
    assert any(name.endswith("mlp.gate.weight") for name in theirs)


@pytest.mark.parametrize("options", [{}, {"mtp_loss": 0.3, "checkpointing": "full"}])
def test_a_packed_row_has_the_sequence_loss_of_its_documents(options):
    model = build(7, balance_loss=1e-4, **options)
    parts = documents(7, LENGTHS)
    packed = model(**row(parts, padding=6)).auxiliary["aux_loss"]
    apart = [model(**row([part])).auxiliary["aux_loss"] for part in parts]
    assert packed.total.item() == pytest.approx(sum(a.total.item() for a in apart), rel=1e-5)
    assert packed.count == sum(a.count for a in apart)


def test_even_routing_costs_one():
    model = build(8, {"n_routed_experts": 8, "num_experts_per_tok": 2}, balance_loss=1.0)
    with torch.no_grad():
        for layer in _learned(model):
            layer.mlp.gate.weight.zero_()  # every score alike: P is even, and f · P does not depend on the choice
    found = model(**row(documents(8, LENGTHS))).auxiliary["aux_loss"]
    assert (found.total / found.count).item() == pytest.approx(1.0)
    assert found.weight == len(_learned(model))


def test_recomputation_leaves_the_gradient_of_the_sequence_loss():
    rows = row(documents(9, LENGTHS), padding=2)
    plain, again = (build(9, balance_loss=0.1, checkpointing=kind) for kind in ("none", "full"))
    expected = gradients(plain, plain(**rows).auxiliary["aux_loss"].total)
    found = gradients(again, again(**rows).auxiliary["aux_loss"].total)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
