"""Recorded expert choices are taken again: the same weights give the same results, other ones keep the experts."""

from __future__ import annotations

import pytest
import torch
from v4_models import build, documents, gradients, row


def recorded(model, rows, **arguments):
    with model.record_routing() as record:
        output = model(**rows, **arguments)
    return output, record


@pytest.mark.parametrize("options", [{}, {"checkpointing": "full"}, {"mtp_loss": 0.3}])
@pytest.mark.parametrize("seed", [0, 1])
def test_replaying_a_model_s_own_choices_changes_nothing(seed, options):
    model = build(seed, balance_loss=0.1, **options)
    rows = row(documents(seed, [13, 4, 9]), padding=3)
    output, record = recorded(model, rows)
    again = model(**rows, routing=record)
    assert torch.equal(output.hidden_BTD, again.hidden_BTD)

    def loss(output):
        return output.hidden_BTD.square().sum() + sum(a.total for a in output.auxiliary.values())

    expected, found = gradients(model, loss(output)), gradients(model, loss(again))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["model.layers.1.mlp.gate.weight"].any()


@pytest.mark.parametrize("seed", [2, 3])
def test_a_record_holds_every_layer_small(seed):
    model = build(seed, mtp_loss=0.3)
    rows = row(documents(seed, [13, 4]))
    _, record = recorded(model, rows)
    assert len(record.experts) == 4  # one hash layer, two learned, the block of multi-token prediction
    k = model.config.num_experts_per_tok
    assert all(e.dtype == torch.int16 and e.shape == (17, k) for e in record.experts)
    table = model.model.layers[0].mlp.gate.tid2eid[rows["input_ids"].flatten()]
    assert torch.equal(record.experts[0].long(), table)


@pytest.mark.parametrize("seed", [4, 5])
def test_changed_weights_keep_the_recorded_experts_and_weigh_them_anew(seed):
    model = build(seed)
    rows = row(documents(seed, [13, 4, 9]))
    output, record = recorded(model, rows)
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
        gate.tid2eid.copy_((gate.tid2eid + 1) % model.config.n_routed_experts)
    free, own = recorded(model, rows)
    held, kept = recorded(model, rows, routing=record)
    assert all(not torch.equal(a, b) for a, b in zip(own.experts, record.experts, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept.experts, record.experts, strict=True))
    assert not torch.equal(held.hidden_BTD, free.hidden_BTD)
    assert not torch.equal(held.hidden_BTD, output.hidden_BTD)  # the weights of the experts are today's
    assert gradients(model, held.hidden_BTD.sum())["model.layers.1.mlp.gate.weight"].any()


def test_replayed_tokens_count_in_the_load():
    model = build(6)
    rows = row(documents(6, [13, 4]))
    _, record = recorded(model, rows)
    model.finish_step(lambda load: load, True)
    everyone = [torch.zeros_like(experts) for experts in record.experts]
    k = model.config.num_experts_per_tok
    record.experts = [e + torch.arange(k, dtype=torch.int16) for e in everyone]
    model(**rows, routing=record)
    load = model.model.layers[1].mlp.gate.load_E.tolist()
    assert load == [17] * k + [0] * (model.config.n_routed_experts - k)


def test_a_sampler_s_record_leaves_multi_token_prediction_free():
    model = build(7, mtp_loss=0.3)
    rows = row(documents(7, [13, 4]))
    output, record = recorded(model, rows)
    record.experts.pop()
    again = model(**rows, routing=record)
    assert torch.equal(again.auxiliary["mtp_loss"].total, output.auxiliary["mtp_loss"].total)


def test_a_record_of_other_rows_or_of_two_passes_is_refused():
    model = build(8)
    rows, other = row(documents(8, [13])), row(documents(8, [12]))
    _, record = recorded(model, rows)
    with pytest.raises(ValueError, match="the same rows"):
        model(**other, routing=record)
    record.experts.pop()
    with pytest.raises(ValueError, match="2 layers"):
        model(**rows, routing=record)
    with model.record_routing(), pytest.raises(ValueError, match="one forward pass"):
        model(**rows)
        model(**rows)
    model(**rows)  # outside, passes are free
