"""Preference losses: by hand, against the papers' formulas, and the same however the pairs are packed and split."""

from __future__ import annotations

from math import exp, log
from typing import get_args

import pytest
import torch
from pair_rows import D, Doc, T, leaves, log_prob, make_pairs, pack, token_values

from lab_utils.errors import RunError
from lab_utils.objectives import get_objective
from lab_utils.recipe.objectives import PreferenceObjective
from lab_utils.telemetry.names import lookup
from lab_utils.telemetry.reductions import Mean, reduce_metrics

VARIANTS = [
    {"loss": "dpo"},
    {"loss": "dpo", "label_smoothing": 0.1, "beta": 0.7, "sft_weight": 0.3},
    {"loss": "dpo", "length_normalised": True, "beta": 2.0},
    {"loss": "robust", "label_smoothing": 0.2, "beta": 0.5},
    {"loss": "hinge", "beta": 0.4, "sft_weight": 1.0},
    {"loss": "ipo"},
    {"loss": "ipo", "length_normalised": True, "beta": 0.5},
    {"loss": "simpo", "beta": 2.0, "target_margin": 0.8, "label_smoothing": 0.1},
    {"loss": "orpo", "beta": 0.25},
    {"loss": "simpo"},
    {"loss": "cpo", "beta": 0.3, "sft_weight": 1.0},
    {"loss": "cpo", "length_normalised": True},
    {"loss": "kto", "beta": 0.6},
    {
        "loss": "kto",
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
        "length_normalised": True,
        "sft_weight": 0.5,
    },
]
Z0 = 0.37


def section_of(**options) -> PreferenceObjective:
    return PreferenceObjective(kind="preference", **options)


def documents_of(section: PreferenceObjective) -> int:
    return 3 if section.loss == "kto" else 2


def variant(options: dict) -> str:
    return "-".join(str(value) for value in options.values())


# -- by hand -------------------------------------------------------------------------------------------------------


def certain(*probabilities: float, reference: float = 0.5) -> Doc:
    """One prompt token, then an answer of which the model gives each token a stated probability."""
    n = len(probabilities) + 1
    ids, bears = torch.zeros(n, dtype=torch.long), torch.arange(n) > 0
    # With the identity as head, these logits are log-probabilities already: p for token 0, 1 - p for token 1.
    hidden = torch.full((n, D), -80.0)
    for t, p in enumerate(probabilities):
        hidden[t, 0], hidden[t, 1] = log(p), log(1 - p)
    return Doc(ids, bears, hidden.requires_grad_(), bears * log(reference))


BY_HAND = [
    # x: 0 and log ½ with the reference, so Δ = log 2 and σ(Δ) = ⅔
    ({"loss": "dpo"}, log(1.5)),
    ({"loss": "dpo", "label_smoothing": 0.25}, 0.75 * log(1.5) + 0.25 * log(3)),
    ({"loss": "robust", "label_smoothing": 0.25}, (0.75 * log(1.5) - 0.25 * log(3)) / 0.5),
    ({"loss": "hinge"}, 1 - log(2)),
    ({"loss": "ipo"}, (log(2) - 0.5) ** 2),
    ({"loss": "dpo", "sft_weight": 2.0}, log(1.5) + 2 * log(2)),
    # both answers have a probability of ¼, but mean log-probabilities of log ½ and log ¼
    ({"loss": "cpo", "sft_weight": 0.0}, log(2)),
    ({"loss": "cpo", "length_normalised": True, "sft_weight": 0.0}, log(1.5)),
    ({"loss": "cpo"}, 2 * log(2)),
    ({"loss": "simpo", "target_margin": log(2)}, log(2)),
    ({"loss": "simpo", "target_margin": 0.0}, log(1.5)),
    # odds of 1 and ⅓
    ({"loss": "orpo"}, log(2) + log(4 / 3)),
    # z0 = log 2: σ(log 2) and σ(-2 log 2)
    ({"loss": "kto"}, 2 / 3 + 1 / 5),
    ({"loss": "kto", "desirable_weight": 3.0, "undesirable_weight": 5.0}, 2 + 1),
    ({"loss": "kto", "sft_weight": 1.0}, 2 / 3 + 1 / 5 + 2 * log(2)),
]


@pytest.mark.parametrize(
    "options, expected", BY_HAND, ids=lambda o: variant(o) if isinstance(o, dict) else ""
)
def test_a_pair_worked_out_by_hand(options, expected):
    section = section_of(beta=1.0, **options)
    pair = [certain(0.5, 0.5), certain(0.25)] + [certain(0.5)] * (section.loss == "kto")
    hidden, rows = pack([[pair]], z0=log(2))
    output = get_objective(section)(hidden, torch.eye(D), rows)
    assert float(output.loss.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(output.loss.count) == (2 if section.loss == "kto" else 1)
    assert output.metrics["logps/chosen"].value == pytest.approx(log(0.25), rel=1e-5)
    assert output.metrics["logps/rejected"].value == pytest.approx(log(0.25), rel=1e-5)


def test_a_negative_estimate_of_the_kl_counts_as_zero():
    pair = [certain(0.5, 0.5), certain(0.25), certain(0.5)]
    hidden, rows = pack([[pair]], z0=-1.0)
    output = get_objective(section_of(loss="kto", beta=1.0))(hidden, torch.eye(D), rows)
    assert float(output.loss.total.detach()) == pytest.approx(1 / 2 + 1 / 3, rel=1e-5)
    assert output.metrics["kl"].value == 0


# -- against the papers' formulas ----------------------------------------------------------------------------------


def x_of(doc: Doc, head: torch.Tensor, section: PreferenceObjective) -> torch.Tensor:
    x = log_prob(doc, head)
    if section.loss in ("dpo", "robust", "hinge", "ipo", "kto"):
        x = x - doc.reference.double().sum()
    mean = section.length_normalised or section.loss in ("simpo", "orpo")
    return x / int(doc.bears.sum()) if mean else x


def paper_loss(pair: list[Doc], head: torch.Tensor, s: PreferenceObjective) -> torch.Tensor:
    """Of one pair (kto: of its two answers), in probabilities where the papers have them, in fp64."""
    s = s.resolved()
    w, lo = (x_of(doc, head, s) for doc in pair[:2])
    sigmoid, e = torch.sigmoid, s.label_smoothing
    p = sigmoid(s.beta * (w - lo))
    if s.loss in ("dpo", "cpo"):
        loss = -(1 - e) * p.log() - e * (1 - p).log()
    elif s.loss == "robust":
        loss = ((1 - e) * -p.log() - e * -(1 - p).log()) / (1 - 2 * e)
    elif s.loss == "hinge":
        loss = torch.clamp(1 - s.beta * (w - lo), min=0)
    elif s.loss == "ipo":
        loss = (w - lo - 0.5 / s.beta).square()
    elif s.loss == "simpo":
        p = sigmoid(s.beta * w - s.beta * lo - s.target_margin)
        loss = -(1 - e) * p.log() - e * (1 - p).log()
    elif s.loss == "orpo":
        odds_w, odds_l = (x.exp() / (1 - x.exp()) for x in (w, lo))
        loss = -w - s.beta * torch.log(sigmoid(torch.log(odds_w / odds_l)))
    else:
        v_w = s.desirable_weight * sigmoid(s.beta * (w - Z0))
        v_l = s.undesirable_weight * sigmoid(s.beta * (Z0 - lo))
        loss = s.desirable_weight - v_w + s.undesirable_weight - v_l
    nll = -log_prob(pair[0], head) / int(pair[0].bears.sum())
    return loss + s.sft_weight * nll * (2 if s.loss == "kto" else 1)


@pytest.mark.parametrize("options", VARIANTS, ids=variant)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_are_the_papers(options, seed):
    section = section_of(**options)
    pairs, head = make_pairs(seed, 4, documents_of(section))
    hidden, rows = pack([pairs[:1], [], pairs[1:2], pairs[2:3], pairs[3:]], z0=Z0)
    objective = get_objective(section)
    output = objective(hidden, head, rows)
    each = 2 if section.loss == "kto" else 1
    assert float(output.loss.count) == objective.denominator(rows) == 4 * each
    expected = sum(paper_loss(pair, head, section) for pair in pairs)
    assert output.loss.total.dtype == torch.float32
    torch.testing.assert_close(output.loss.total.double(), expected, rtol=2e-5, atol=1e-5)
    inputs = leaves(pairs, head)
    ours = torch.autograd.grad(output.loss.total, inputs, materialize_grads=True)
    theirs = torch.autograd.grad(expected, inputs, materialize_grads=True)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=2e-4, atol=1e-5)
    assert sum(float(g.abs().sum()) for g in ours) > 0
    for leaf in output.metrics:
        assert lookup(f"train/{leaf}") is not None, leaf


PAPERS = {
    "dpo": {"beta": 0.1},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "simpo": {"beta": 2.0, "target_margin": 1.0},
    "orpo": {"beta": 0.1},
    "kto": {"beta": 0.1},
    "cpo": {"beta": 0.1, "sft_weight": 1.0},
}


@pytest.mark.parametrize("loss", get_args(PreferenceObjective.model_fields["loss"].annotation))
def test_what_a_recipe_leaves_out_is_the_papers(loss):
    """Absent and spelt out, the loss is the same; another β gives another one, and the recipe's own stands."""
    smoothed = {"label_smoothing": 0.1} if loss == "robust" else {}
    pairs, head = make_pairs(4, 3, documents_of(section_of(loss=loss, **smoothed)))

    def value(**options) -> float:
        hidden, rows = pack([[pair] for pair in pairs], z0=Z0)
        section = section_of(loss=loss, **smoothed, **options)
        return float(get_objective(section)(hidden, head, rows).loss.total.detach())

    spelt = {key: v for key, v in PAPERS[loss].items() if key not in smoothed}
    assert value() == value(**spelt)
    for field, paper in spelt.items():
        other = {**spelt, field: 0.7 * paper}
        assert value(**other) != pytest.approx(value(), rel=1e-4), field
        assert getattr(section_of(loss=loss, **smoothed, **other).resolved(), field) == 0.7 * paper
    if loss == "simpo":  # the margin follows β
        assert value(beta=3.0) == value(beta=3.0, target_margin=1.5)


def test_metrics_say_what_the_answers_are():
    section = section_of(loss="dpo", beta=0.3)
    pairs, head = make_pairs(7, 5)
    hidden, rows = pack([[pair] for pair in pairs])
    found = {key: m.value for key, m in get_objective(section)(hidden, head, rows).metrics.items()}
    x = torch.stack([torch.stack([0.3 * x_of(doc, head, section) for doc in pair]) for pair in pairs])
    sums = torch.stack([torch.stack([log_prob(doc, head) for doc in pair]) for pair in pairs])
    of = [[token_values(doc, head) for doc in pair] for pair in pairs]
    expected = {
        "rewards/chosen": x[:, 0].mean(),
        "rewards/rejected": x[:, 1].mean(),
        "rewards/margins": (x[:, 0] - x[:, 1]).mean(),
        "rewards/accuracies": (x[:, 0] > x[:, 1]).double().mean(),
        "logps/chosen": sums[:, 0].mean(),
        "logps/rejected": sums[:, 1].mean(),
        "mean_token_accuracy": torch.cat([pair[0][1] for pair in of]).double().mean(),
        "entropy": torch.cat([values[2] for pair in of for values in pair]).mean(),
    }
    assert found == pytest.approx(
        {key: float(value.detach()) for key, value in expected.items()}, rel=1e-4, abs=1e-6
    )


# -- whatever the layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS, ids=variant)
def test_the_same_pairs_in_other_rows_and_micro_batches_add_up_to_the_same(options, monkeypatch):
    section = section_of(**options)
    pairs, head = make_pairs(11, 6, documents_of(section))
    objective, inputs = get_objective(section), leaves(pairs, head)

    def learn(*micro: list[list[list[Doc]]]) -> tuple[dict, list[torch.Tensor]]:
        parts, gradients = [], [torch.zeros_like(leaf) for leaf in inputs]
        for layout in micro:
            hidden, rows = pack(layout, z0=Z0)
            output = objective(hidden, head, rows)
            assert float(output.loss.count) == objective.denominator(rows)
            parts.append({"loss": Mean(output.loss.total.detach(), output.loss.count), **output.metrics})
            found = torch.autograd.grad(output.loss.total, inputs, materialize_grads=True)
            gradients = [a + b for a, b in zip(gradients, found, strict=True)]
        return {key: m.to_floats() for key, m in reduce_metrics(parts).items()}, gradients

    whole, gradients = learn([[pair] for pair in pairs])
    monkeypatch.setattr("pair_rows.T", 6 * 3 * 10)  # all pairs fit one row
    for micro in (
        [[pairs[:2], pairs[2:]]],
        [[pairs[3:]], [[]], [pairs[:1], [], pairs[1:3]]],
        [[pairs[::-1]]],
    ):
        found, other = learn(*micro)
        assert set(found) == set(whole)
        for key in whole:
            assert found[key][0] == pytest.approx(whole[key][0], rel=1e-5, abs=1e-5), key
        for a, b in zip(gradients, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS, ids=variant)
def test_rows_of_padding_backpropagate_a_zero(options):
    section = section_of(**options)
    pairs, head = make_pairs(0, 1, documents_of(section))
    _, rows = pack([pairs])
    empty = rows.with_rows(3).slice(1, 3)
    empty.side["z0"] = torch.zeros(2, 1)
    hidden = torch.randn(2, T, D).requires_grad_()
    objective = get_objective(section)
    output = objective(hidden, head, empty)
    output.loss.total.backward()
    assert float(output.loss.total.detach()) == 0 == float(output.loss.count) == objective.denominator(empty)
    assert hidden.grad is not None and not hidden.grad.any()
    assert all(metric.empty for metric in output.metrics.values())
    assert all(metric.empty for metric in objective.statistics(hidden, head, empty).values())


# -- kto's estimate of the KL --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True])
def test_the_kl_is_measured_on_mismatched_answers_over_all_micro_batches(normalised):
    section = section_of(loss="kto", length_normalised=normalised)
    pairs, head = make_pairs(5, 4, 3)
    objective = get_objective(section)
    micro = [pack([[pair] for pair in some] + [[]]) for some in (pairs[:1], pairs[1:])]
    found = reduce_metrics([objective.statistics(hidden, head, rows) for hidden, rows in micro])
    assert set(found) == {"z0"} and isinstance(found["z0"], Mean) and not found["z0"].total.requires_grad
    expected = torch.stack([x_of(pair[2], head, section) for pair in pairs]).mean()
    assert (
        found["z0"].value == pytest.approx(float(expected.detach()), rel=1e-5)
        and float(found["z0"].count) == 4
    )


def test_mismatched_answers_are_not_learnt_and_only_kto_has_statistics():
    pairs, head = make_pairs(5, 2, 3)
    hidden, rows = pack([[pair] for pair in pairs], z0=Z0)
    output = get_objective(section_of(loss="kto"))(hidden, head, rows)
    gradients = torch.autograd.grad(output.loss.total, [pair[2].hidden for pair in pairs])
    assert not any(gradient.any() for gradient in gradients)
    assert output.metrics["kl"].value == pytest.approx(Z0)
    answers = [token_values(doc, head)[2] for pair in pairs for doc in pair[:2]]
    assert output.metrics["entropy"].value == pytest.approx(
        float(torch.cat(answers).mean().detach()), rel=1e-4
    )
    assert get_objective(section_of(loss="dpo")).statistics(hidden, head, rows) == {}


# -- numbers at their limits ---------------------------------------------------------------------------------------


def sure(*right: bool) -> Doc:
    """An answer of tokens that have all the probability, or as good as none."""
    doc = certain(*[0.5] * len(right))
    with torch.no_grad():
        doc.hidden.zero_()
        for t, hit in enumerate(right):
            doc.hidden[t, 0 if hit else 1] = 400.0
    return doc


@pytest.mark.parametrize("chosen, rejected", [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("options", VARIANTS, ids=variant)
def test_certain_answers_give_finite_losses_and_gradients(options, chosen, rejected):
    section = section_of(**options)
    pair = [sure(chosen, chosen), sure(rejected)] + [sure(True)] * (section.loss == "kto")
    hidden, rows = pack([[pair]], z0=Z0)
    output = get_objective(section)(hidden, torch.eye(D), rows)
    assert output.metrics["logps/chosen"].value == (0 if chosen else -800)
    gradients = torch.autograd.grad(output.loss.total, [doc.hidden for doc in pair], materialize_grads=True)
    assert torch.isfinite(output.loss.total) and all(torch.isfinite(g).all() for g in gradients)


def test_odds_are_exact_near_zero_and_one():
    from lab_utils.objectives.preference import _log_odds

    x = -torch.logspace(-5.5, 2, 60, dtype=torch.float64)
    exact = torch.tensor([float(v) - log(-torch.expm1(v)) for v in x], dtype=torch.float64)
    torch.testing.assert_close(_log_odds(x.float()).double(), exact, rtol=1e-5, atol=2e-6)
    assert exp(float(_log_odds(torch.tensor(log(0.8))))) == pytest.approx(4, rel=1e-5)


def test_losses_of_a_model_in_bf16_are_in_fp32():
    section = section_of(loss="dpo")
    pairs, head = make_pairs(3, 2)
    hidden, rows = pack([[pair] for pair in pairs])
    output = get_objective(section)(hidden.bfloat16(), head.bfloat16(), rows)
    with torch.no_grad():
        for doc in (doc for pair in pairs for doc in pair):
            doc.hidden.copy_(doc.hidden.bfloat16())
        expected = sum(paper_loss(pair, head.bfloat16().float(), section) for pair in pairs)
    assert output.loss.total.dtype == torch.float32
    assert float(output.loss.total.detach()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loss, name", [("dpo", "reference_logps"), ("kto", "z0")])
def test_a_missing_side_tensor_is_named(loss, name):
    pairs, head = make_pairs(0, 1, 3 if loss == "kto" else 2)
    hidden, rows = pack([pairs], z0=Z0)
    del rows.side[name]
    with pytest.raises(RunError, match=f"no {name}"):
        get_objective(section_of(loss=loss))(hidden, head, rows)
