"""Distillation against dense softmaxes, document by document in fp64, with several teachers in a row."""

from __future__ import annotations

import pytest
import torch
from answer_rows import SIDE_OF_TEACHERS, D, E, V, distributions, leaves, log_probs, make_docs, pack, spread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from lab_utils.errors import DataError
from lab_utils.objectives.distill import Distill
from lab_utils.recipe.objectives import DistillObjective, RolloutSection
from lab_utils.telemetry.names import lookup
from lab_utils.telemetry.reductions import reduce_metrics

SAMPLED = ("teacher", "teacher_weight", "teacher_logps")
TEACHERS = 3


def build(temperature: float | None = None, seed: int = 0, teachers: int = TEACHERS, **fields) -> Distill:
    """``temperature``: of samples; None: texts that nobody sampled."""
    on_policy = temperature is not None
    sources = [{"source": f"teacher-{i}"} for i in range(teachers)]
    section = DistillObjective(kind="distill", teachers=sources, on_policy=on_policy, **fields)
    rollout = RolloutSection(temperature=temperature) if on_policy else None
    objective = Distill.from_section(section, rollout=rollout)
    g = torch.Generator().manual_seed(seed)
    objective.heads = {i: torch.randn(V, E, generator=g) for i in range(teachers)}
    return objective


def of_teacher(doc, objective: Distill) -> torch.Tensor:
    """The teacher's logits at the document's tokens with loss, fp64."""
    head = objective.heads[int(doc.side["teacher"][0])].double()
    return doc.side["teacher_hidden"].double()[doc.at - 1] @ head.T / objective.temperature


def divergences(doc, head: torch.Tensor, objective: Distill) -> torch.Tensor:
    """By torch's own distributions."""
    q = Categorical(logits=distributions(doc, head, objective.temperature))
    p = Categorical(logits=of_teacher(doc, objective))
    loss, beta = objective.section.loss, objective.section.beta
    if loss == "reverse_kl":
        return kl_divergence(q, p)
    if loss == "forward_kl":
        return kl_divergence(p, q)
    m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)


def compare(found: torch.Tensor, wanted: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs),
        torch.autograd.grad(wanted, inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 6),
    rows=st.integers(3, 5),
    loss=st.sampled_from(["reverse_kl", "forward_kl", "js"]),
    beta=st.sampled_from([0.5, 0.2]),
    temperature=st.sampled_from([None, 1.0, 0.7]),
)
def test_whole_distributions_are_compared(seed, count, rows, loss, beta, temperature):
    docs, head = make_docs(seed, count)
    objective = build(temperature, seed, loss=loss, **({"beta": beta} if loss == "js" else {}))
    hidden, packed = pack(spread(docs, rows), SIDE_OF_TEACHERS)
    output = objective(hidden, head, packed)
    parts = [divergences(doc, head, objective) for doc in docs]
    weights = [float(doc.side["teacher_weight"][0]) for doc in docs]
    compare(output.loss.total, sum(w * part.sum() for w, part in zip(weights, parts)), leaves(docs, head))
    tokens = sum(len(doc.at) for doc in docs)
    assert float(output.loss.count) == tokens == objective.denominator(packed)

    found = {name: metric.value for name, metric in output.metrics.items() if not metric.empty}
    q = torch.cat([distributions(doc, head, objective.temperature) for doc in docs]).detach()
    p = torch.cat([of_teacher(doc, objective) for doc in docs])
    wanted = {
        "teacher_kl": float(torch.cat(parts).detach().mean()),
        "mean_token_accuracy": float((q.argmax(1) == p.argmax(1)).double().mean()),
        "entropy": float(-(q.exp() * q).sum(1).mean()),
    }
    for i in range(TEACHERS):
        own = [part for part, doc in zip(parts, docs, strict=True) if int(doc.side["teacher"][0]) == i]
        if own:
            wanted[f"teacher_kl/{i}"] = float(torch.cat(own).detach().mean())
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert all(lookup(f"train/{leaf}") is not None for leaf in output.metrics)


def test_a_row_with_several_teachers_is_the_same_as_rows_of_one_each():
    docs, head = make_docs(2, 3)
    for i, doc in enumerate(docs):
        doc.side["teacher"][:] = i
    objective = build()
    together, apart = ([docs], [[doc] for doc in docs])
    results = []
    for layout in (together, apart):
        hidden, packed = pack(layout, SIDE_OF_TEACHERS)
        assert len(packed.side["teacher"][packed.document_ids >= 0].unique()) == 3
        output = objective(hidden, head, packed)
        results.append((output.loss.total, output.metrics["teacher_kl/1"].value))
    compare(results[0][0], results[1][0], leaves(docs, head))
    assert results[0][1] == pytest.approx(results[1][1])


@pytest.mark.parametrize("loss", ["reverse_kl", "sampled_token"])
def test_any_packing_into_micro_batches_adds_up_to_the_same(loss):
    docs, head = make_docs(4, 6)
    objective = build(1.0, loss=loss)
    names = SAMPLED if loss == "sampled_token" else SIDE_OF_TEACHERS
    results = []
    for layout, height in (([docs[:3], docs[3:], []], 3), (spread(docs[::-1], 5), 1), (spread(docs, 7), 2)):
        hidden, packed = pack(layout, names)
        starts = range(0, len(layout), height)
        parts = [objective(hidden[i : i + height], head, packed.slice(i, i + height)) for i in starts]
        merged = reduce_metrics([{"loss": part.loss, **part.metrics} for part in parts])
        denominators = sum(objective.denominator(packed.slice(i, i + height)) for i in starts)
        assert float(merged["loss"].count) == denominators
        results.append((merged.pop("loss").total, {name: metric.value for name, metric in merged.items()}))
    for total, values in results[1:]:
        assert values == pytest.approx(results[0][1], rel=1e-4, nan_ok=True)
        compare(total, results[0][0], leaves(docs, head))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([1.0, 0.7]), masked=st.booleans())
def test_sampled_tokens_weigh_their_log_probability_by_the_gap(seed, temperature, masked):
    docs, head = make_docs(seed, 4)
    objective = build(temperature, loss="sampled_token")
    hidden, packed = pack(spread(docs, 4), (*SAMPLED, "kept") if masked else SAMPLED)
    output = objective(hidden, head, packed)
    surrogate = value = 0.0
    for doc in docs:
        logp, w = log_probs(doc, head, temperature, masked), float(doc.side["teacher_weight"][0])
        gap = logp.detach() - doc.side["teacher_logps"][doc.at]
        surrogate, value = surrogate + w * (gap * logp).sum(), value + w * gap.sum()
    torch.testing.assert_close(output.loss.total.detach().double(), value, rtol=1e-4, atol=1e-5)
    inputs = leaves(docs, head)
    for ours, theirs in zip(
        torch.autograd.grad(output.loss.total, inputs), torch.autograd.grad(surrogate, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_tokens_average_to_the_gradient_of_the_reverse_kl(temperature):
    """Exactly: one position, every token of the vocabulary drawn with its probability."""
    docs, head = make_docs(6, 1)
    (doc,) = docs
    doc.bears[:-1] = False
    whole, sampled = build(temperature), build(temperature, loss="sampled_token")
    p = of_teacher(doc, whole).log_softmax(-1)[0]
    q = distributions(doc, head, temperature)[0].detach()
    average = 0.0
    for token in range(V):
        doc.ids[-1] = token
        doc.side["teacher_logps"][-1] = float(p[token])
        hidden, packed = pack([docs], SAMPLED)
        average = average + float(q[token].exp()) * sampled(hidden, head, packed).loss.total
    hidden, packed = pack([docs], SIDE_OF_TEACHERS)
    compare(average, whole(hidden, head, packed).loss.total, leaves(docs, head))


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "js"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(loss):
    docs, head = make_docs(7, 3)
    for doc in docs:
        doc.side["teacher_hidden"] = torch.nn.functional.pad(doc.hidden.detach(), (0, 0))[:, :E]
        doc.hidden = torch.nn.functional.pad(doc.side["teacher_hidden"], (0, D - E)).requires_grad_()
        doc.side["teacher"][:] = 0
    objective = build(loss=loss, teachers=1)
    objective.heads = {0: head.detach()[:, :E].contiguous()}
    hidden, packed = pack(spread(docs, 3), SIDE_OF_TEACHERS)
    output = objective(hidden, head, packed)
    grads = torch.autograd.grad(output.loss.total, leaves(docs, head))
    assert all(g.abs().max() < 1e-5 for g in grads)
    assert output.metrics["teacher_kl"].value == pytest.approx(0, abs=1e-6)
    assert output.metrics["mean_token_accuracy"].value == 1
    assert "teacher_kl/0" not in output.metrics, "of one teacher there is no second curve"


def test_bf16_states_and_heads_are_compared_in_full_precision():
    docs, head = make_docs(9, 4)
    objective = build(0.7)
    objective.heads = {i: each.bfloat16() for i, each in objective.heads.items()}
    hidden, packed = pack(spread(docs, 3), SIDE_OF_TEACHERS)
    packed.side["teacher_hidden"] = packed.side["teacher_hidden"].bfloat16()
    small = objective(hidden.bfloat16(), head.bfloat16(), packed)
    small.loss.total.backward()
    objective.heads = {i: each.float() for i, each in objective.heads.items()}
    packed.side["teacher_hidden"] = packed.side["teacher_hidden"].float()
    full = objective(hidden.bfloat16().float(), head.bfloat16().float(), packed)
    torch.testing.assert_close(small.loss.total, full.loss.total, rtol=1e-5, atol=1e-5)
    agreed = "mean_token_accuracy"
    assert small.metrics[agreed].value == full.metrics[agreed].value


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "js", "sampled_token"])
def test_rows_of_padding_alone_can_be_backpropagated(loss):
    head = torch.randn(V, D, requires_grad=True)
    hidden, packed = pack([[], []], (*SIDE_OF_TEACHERS, "teacher_logps"))
    objective = build(1.0, loss=loss)
    output = objective(hidden, head, packed)
    output.loss.total.backward()
    assert float(output.loss.total.detach()) == 0 == float(output.loss.count) == objective.denominator(packed)
    assert all(metric.empty for metric in output.metrics.values())


def test_what_is_missing_is_named():
    docs, head = make_docs(10, 2)
    for doc in docs:
        doc.side["teacher"][:] = 2
    objective = build()
    hidden, packed = pack(spread(docs, 3), SAMPLED)
    with pytest.raises(DataError, match="'teacher_hidden'"):
        objective(hidden, head, packed)
    hidden, packed = pack(spread(docs, 3), SIDE_OF_TEACHERS)
    del objective.heads[2]
    with pytest.raises(DataError, match=r"teacher 2, .*\(heads: \[0, 1\]\)"):
        objective(hidden, head, packed)
