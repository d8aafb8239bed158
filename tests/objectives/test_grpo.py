"""Policy gradients against the papers' formulas, one answer at a time in fp64, whatever the packing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from answer_rows import D, V, distributions, leaves, log_probs, make_docs, pack, spread
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lab_utils.errors import DataError, RecipeError
from lab_utils.objectives._kept import kept_logprob, policy_logps
from lab_utils.objectives._ratios import clipped_gain, kl_estimate
from lab_utils.objectives.grpo import Grpo
from lab_utils.recipe.objectives import GrpoObjective, RolloutSection
from lab_utils.telemetry.names import lookup
from lab_utils.telemetry.reductions import reduce_metrics

SIDE = ("advantages", "old_logps", "sampler_logps", "reference_logps")
LONGEST = 24


def build(temperature: float = 1.0, **fields) -> Grpo:
    rollout = RolloutSection(temperature=temperature, max_new_tokens=LONGEST)
    return Grpo.from_section(GrpoObjective(kind="grpo", **fields), rollout=rollout)


def expected(docs, head, section, temperature=1.0, masked=False):
    """Σ of the loss and its denominator, straight from the definitions, with plain Python conditions."""
    total = 0.0 * head.double().sum()  # a graph, even if every term is constant
    tokens = sum(len(doc.at) for doc in docs)
    for doc in docs:
        logp = log_probs(doc, head, temperature, masked)
        old, reference = (doc.side[name][doc.at].double() for name in ("old_logps", "reference_logps"))
        u, A, n = (logp - old).exp(), doc.advantage, len(doc.at)
        if section.loss == "gspo":
            # The sequence's likelihood ratio to the power 1/|y|.
            s = ((logp.sum() - old.sum()) / n).exp()
            terms = [s] * n
        else:
            terms = list(u)
        left_out = (
            section.sequence_mask is not None
            and A < 0
            and float((old - logp.detach()).mean()) > section.sequence_mask
        )
        for t in range(n):
            if section.loss == "reinforce":
                gain = A * logp[t]
            else:
                r = terms[t]
                if A >= 0:
                    gain = A * r if r <= 1 + section.clip_high else A * (1 + section.clip_high)
                else:
                    gain = A * r if r >= 1 - section.clip_low else A * (1 - section.clip_low)
                    if section.dual_clip and r > section.dual_clip:
                        gain = A * section.dual_clip
            term = -gain * (not left_out)
            if section.kl_weight:
                v = (reference[t] - logp[t]).exp()
                kl = {
                    "k2": v.log() ** 2 / 2,
                    "k3": v - 1 - v.log(),
                    "unbiased": u[t] * (v - 1 - v.log()),
                }
                term = term + section.kl_weight * kl[section.kl_estimator]
            total = total + term / (n if section.normalisation == "sequence" else 1)
    count = {"sequence": len(docs), "token": tokens, "constant": len(docs) * LONGEST}
    return total, float(count[section.normalisation])


def gradients(loss, inputs):
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 6),
    rows=st.integers(3, 5),
    loss=st.sampled_from(["grpo", "gspo", "reinforce"]),
    normalisation=st.sampled_from(["sequence", "token", "constant"]),
    kl=st.sampled_from([None, "k2", "k3", "unbiased"]),
    mask=st.sampled_from([None, 0.05]),
    dual=st.sampled_from([None, 1.5]),
    temperature=st.sampled_from([1.0, 0.7]),
    masked=st.booleans(),
    double=st.booleans(),
)
@example(735, 6, 3, "gspo", "token", "k3", None, 1.5, 1.0, False, True)
def test_loss_and_gradients_are_the_papers(
    seed, count, rows, loss, normalisation, kl, mask, dual, temperature, masked, double
):
    """In fp64 to many digits; in fp32, where ratios far from 1 cancel, next to the largest gradient."""
    temperature = 1.0 if double else temperature
    docs, head = make_docs(seed, count, temperature, masked)
    if double:
        head = head.detach().double().requires_grad_()
        for doc in docs:
            doc.hidden = doc.hidden.detach().double().requires_grad_()
    digits = 1e-6 if double else 1e-3
    fields = {"loss": loss, "normalisation": normalisation, "sequence_mask": mask}
    if kl:
        fields |= {"kl_weight": 0.3, "kl_estimator": kl}
    if loss != "reinforce":
        fields |= {"dual_clip": dual, "clip_low": 0.1, "clip_high": 0.15}
    objective = build(temperature, **fields)
    hidden, packed = pack(spread(docs, rows), (*SIDE, "kept") if masked else SIDE)
    output = objective(hidden, head, packed)
    total, count_ = expected(docs, head, objective.section, temperature, masked)
    assert float(output.loss.count) == count_ == objective.denominator(packed)
    # Terms near 1 may cancel to little, and what lies beside the rows is fp32 in either case.
    torch.testing.assert_close(output.loss.total.double(), total, rtol=digits, atol=digits)
    inputs = leaves(docs, head)
    slopes = gradients(total, inputs)
    largest = max(float(slope.abs().max()) for slope in slopes)
    for found, wanted in zip(gradients(output.loss.total, inputs), slopes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=digits * largest + digits / 50)
    for leaf in output.metrics:
        assert lookup(f"train/{leaf}") is not None, leaf


@pytest.mark.parametrize("loss", ["grpo", "gspo", "reinforce"])
@pytest.mark.parametrize("normalisation", ["sequence", "token", "constant"])
def test_any_packing_into_micro_batches_adds_up_to_the_same(loss, normalisation):
    docs, head = make_docs(3, 6)
    objective = build(loss=loss, normalisation=normalisation, kl_weight=0.1, sequence_mask=0.05)
    results = []
    for layout, height in (([docs[:3], docs[3:], []], 3), (spread(docs[::-1], 5), 1), (spread(docs, 7), 2)):
        hidden, packed = pack(layout, SIDE)
        parts = [
            objective(hidden[i : i + height], head, packed.slice(i, i + height))
            for i in range(0, len(layout), height)
        ]
        merged = reduce_metrics([{"loss": part.loss, **part.metrics} for part in parts])
        denominators = sum(
            objective.denominator(packed.slice(i, i + height)) for i in range(0, len(layout), height)
        )
        assert float(merged["loss"].count) == denominators
        total = merged.pop("loss").total
        values = {name: metric.value for name, metric in merged.items()} | {"loss": float(total.detach())}
        results.append((values, gradients(total, leaves(docs, head))))
    for values, grads in results[1:]:
        assert values == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        for found, wanted in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def gain(u: float, A: float, dual: float | None = None) -> tuple[float, float, bool, bool]:
    """Value, slope in u, low, high at bounds 0.2 and 0.28."""
    ratio = torch.tensor([u], requires_grad=True)
    value, low, high = clipped_gain(ratio, torch.tensor([A]), 0.2, 0.28, dual)
    (slope,) = torch.autograd.grad(value.sum(), ratio)
    return float(value.detach()), float(slope), bool(low), bool(high)


@pytest.mark.parametrize(
    ("u", "A", "dual", "value", "slope", "low", "high"),
    [
        (1.0, 2.0, None, 2.0, 2.0, False, False),  # on policy: the whole gradient
        (1.0, -2.0, None, -2.0, -2.0, False, False),
        (1.27, 2.0, None, 2.54, 2.0, False, False),  # just inside
        (1.29, 2.0, None, 2.56, 0.0, False, True),  # the upper bound binds
        (1.29, -2.0, None, -2.58, -2.0, False, False),  # and does not where more would be worse
        (0.79, -2.0, None, -1.6, 0.0, True, False),  # the lower bound binds
        (0.79, 2.0, None, 1.58, 2.0, False, False),
        (4.0, -2.0, None, -8.0, -2.0, False, False),
        (4.0, -2.0, 3.0, -6.0, 0.0, False, False),  # the dual bound
        (2.9, -2.0, 3.0, -5.8, -2.0, False, False),
        (4.0, 2.0, 3.0, 2.56, 0.0, False, True),
        (0.5, 0.0, None, 0.0, 0.0, False, False),  # no advantage, nothing is clipped
    ],
)
def test_bounds_bind_where_they_should(u, A, dual, value, slope, low, high):
    assert gain(u, A, dual) == pytest.approx((value, slope, low, high))


def whole(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "unbiased"])
def test_estimators_average_to_what_their_description_says(kind):
    """Exact averages over a vocabulary: of values, and of gradients in the logits."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(V, generator=g, dtype=torch.float64, requires_grad=True)
    reference, old = whole(g, V), whole(g, V)
    own = logits.log_softmax(-1)
    kl = (own.exp() * (own - reference)).sum()
    reverse = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    forward = torch.autograd.grad((reference.exp() * (reference - own)).sum(), logits, retain_graph=True)[0]
    sampled_by = own.detach() if kind != "unbiased" else old
    values = kl_estimate(kind, own, reference, own - sampled_by)
    average = (sampled_by.exp() * values).sum()
    slope = torch.autograd.grad(average, logits)[0]
    wanted = {"k1": torch.zeros_like(slope), "k2": reverse, "k3": forward, "unbiased": reverse}[kind]
    torch.testing.assert_close(slope, wanted, rtol=1e-8, atol=1e-10)
    if kind != "k2":
        assert float(average.detach()) == pytest.approx(float(kl.detach()), rel=1e-8)


def two_answers(drift: float, advantage: float) -> tuple:
    """An answer whose mean log(π_old/π) is ``drift``, beside one of advantage 1 that did not move."""
    docs, head = make_docs(8, 2)
    for doc, by, value in zip(docs, (drift, 0.0), (advantage, 1.0), strict=True):
        doc.advantage = value
        doc.side["old_logps"][doc.at] = (log_probs(doc, head).detach() + by).float()
    return docs, head


@pytest.mark.parametrize(
    ("drift", "advantage", "masked"),
    [(0.6, -1.0, True), (0.4, -1.0, False), (0.6, 1.0, False), (-0.6, -1.0, False)],
)
def test_the_sequence_mask_takes_out_bad_answers_that_drifted(drift, advantage, masked):
    docs, head = two_answers(drift, advantage)
    hidden, packed = pack(spread(docs, 2), SIDE)
    objective = build(sequence_mask=0.5, clip_low=0.9, clip_high=9.0, normalisation="sequence")
    output = objective(hidden, head, packed)
    first, second = gradients(output.loss.total, [doc.hidden for doc in docs])
    assert bool(first.any()) is not masked and second.any()
    assert output.metrics["masked_sequences"].value == (0.5 if masked else 0.0)
    assert float(output.loss.count) == 2, "its place in the mean stays"
    # The KL of an answer that is left out stays (V3.2 eq. 5).
    with_kl = build(sequence_mask=0.5, kl_weight=0.2)(hidden, head, packed)
    assert gradients(with_kl.loss.total, [docs[0].hidden])[0].any()


def test_gspo_gives_all_tokens_of_an_answer_one_gradient_weight():
    """s·A/|y| on each token's ∇log π: eq. 10 of the paper, under the mean over answers."""
    docs, head = make_docs(11, 4)
    hidden, packed = pack(spread(docs, 3), SIDE)
    objective = build(loss="gspo", normalisation="sequence", clip_low=0.9, clip_high=9.0)
    output = objective(hidden, head, packed)
    surrogate = 0.0
    for doc in docs:
        logp = log_probs(doc, head)
        s = (logp.detach() - doc.side["old_logps"][doc.at]).mean().exp()
        surrogate = surrogate - s * doc.advantage * logp.mean()
    inputs = leaves(docs, head)
    for found, wanted in zip(gradients(output.loss.total, inputs), gradients(surrogate, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_without_old_log_probabilities_the_policy_is_its_own():
    docs, head = make_docs(12, 4)
    hidden, packed = pack(spread(docs, 3), ("advantages",))
    output = build()(hidden, head, packed)
    ours = gradients(output.loss.total, leaves(docs, head))
    plain = gradients(build(loss="reinforce")(hidden, head, packed).loss.total, leaves(docs, head))
    for found, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, wanted)
    assert output.metrics["clip_ratio/region_mean"].value == 0


def test_metrics_are_what_their_names_say():
    docs, head = make_docs(21, 6)
    hidden, packed = pack(spread(docs, 4), SIDE)
    metrics = build(clip_low=0.1, clip_high=0.1, kl_weight=0.1, kl_estimator="k3")(
        hidden, head, packed
    ).metrics
    found = {name: metric.value for name, metric in metrics.items()}
    u = [(log_probs(doc, head).detach() - doc.side["old_logps"][doc.at]).exp() for doc in docs]
    low = [(ratio < 0.9) & (doc.advantage < 0) for ratio, doc in zip(u, docs, strict=True)]
    high = [(ratio > 1.1) & (doc.advantage > 0) for ratio, doc in zip(u, docs, strict=True)]
    gap = torch.cat([(doc.side["old_logps"] - doc.side["sampler_logps"])[doc.at] for doc in docs])
    v = torch.cat([doc.side["reference_logps"][doc.at] - log_probs(doc, head).detach() for doc in docs])
    entropy = torch.cat([-(p.exp() * p).sum(-1) for p in (distributions(doc, head).detach() for doc in docs)])

    def share(flags: list[torch.Tensor]) -> float:
        return float(torch.cat(flags).double().mean())

    assert share(low) > 0 and share(high) > 0
    assert found == pytest.approx(
        {
            "entropy": float(entropy.mean()),
            "kl": float((v.exp() - 1 - v).mean()),
            "clip_ratio/low_mean": share(low),
            "clip_ratio/high_mean": share(high),
            "clip_ratio/region_mean": share(low) + share(high),
            "clip_ratio/low_min": min(share([flags]) for flags in low),
            "clip_ratio/high_max": max(share([flags]) for flags in high),
            "policy_loss": found["policy_loss"],
            "sampling/sampling_logp_difference/mean": float(gap.abs().mean()),
            "sampling/sampling_logp_difference/max": float(gap.abs().max()),
            "sampling/importance_sampling_ratio/min": float(gap.exp().min()),
            "sampling/importance_sampling_ratio/mean": float(gap.exp().mean()),
            "sampling/importance_sampling_ratio/max": float(gap.exp().max()),
        },
        rel=1e-4,
    )
    total, count = expected(docs, head, build(clip_low=0.1, clip_high=0.1).section)
    assert found["policy_loss"] == pytest.approx(float(total.detach()) / count, rel=1e-4)


@pytest.mark.parametrize("normalisation", ["sequence", "token", "constant"])
def test_answers_without_advantage_count_and_padding_does_not(normalisation):
    docs, head = make_docs(13, 3, advantage=0.0)
    hidden, packed = pack(spread(docs, 3), SIDE)
    objective = build(normalisation=normalisation)
    padded = packed.with_rows(6)
    wanted = {"sequence": 3, "token": sum(len(doc.at) for doc in docs), "constant": 3 * LONGEST}[
        normalisation
    ]
    assert objective.denominator(packed) == objective.denominator(padded) == wanted
    output = objective(hidden, head, packed)
    assert float(output.loss.total.detach()) == 0 and float(output.loss.count) == wanted


@pytest.mark.parametrize("loss", ["grpo", "gspo", "reinforce"])
@pytest.mark.parametrize("names", [SIDE, (*SIDE, "kept")])
def test_rows_of_padding_alone_can_be_backpropagated(loss, names):
    head = torch.randn(V, D, requires_grad=True)
    hidden, packed = pack([[], []], names)
    objective = build(loss=loss, normalisation="sequence", kl_weight=0.1, sequence_mask=0.5)
    output = objective(hidden, head, packed)
    output.loss.total.backward()
    assert float(output.loss.total.detach()) == 0 == float(output.loss.count) == objective.denominator(packed)
    assert all(metric.empty for metric in output.metrics.values())


def test_ratios_beyond_all_measure_leave_numbers_finite():
    docs, head = make_docs(14, 3)
    for doc, shift in zip(docs, (-300.0, 300.0, -300.0), strict=True):
        doc.side["old_logps"] = doc.side["old_logps"] + shift
        doc.side["reference_logps"] = doc.side["reference_logps"] - shift
    docs[2].advantage = -1.0
    hidden, packed = pack(spread(docs, 3), SIDE)
    for estimator in ("k2", "k3", "unbiased"):
        output = build(kl_weight=0.1, kl_estimator=estimator)(hidden, head, packed)
        assert math.isfinite(output.loss.total.detach())
        assert all(g.isfinite().all() for g in gradients(output.loss.total, leaves(docs, head)))


# -- log-probabilities over kept tokens


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), chunk=st.sampled_from([None, 1, 3]), temperature=st.sampled_from([1.0, 1.7])
)
def test_log_probabilities_over_kept_tokens_are_a_masked_softmax(seed, chunk, temperature):
    docs, head = make_docs(seed, 3)
    states = torch.cat([doc.hidden[doc.at - 1] for doc in docs]) / temperature
    targets = torch.cat([doc.ids[doc.at] for doc in docs])
    kept = torch.cat([doc.side["kept"][doc.at] for doc in docs])
    logp, correct, entropy = kept_logprob(states, head, targets, kept, chunk=chunk)
    full = torch.cat([distributions(doc, head, temperature, masked=True) for doc in docs])
    wanted = full.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(correct, full.argmax(1) == targets)
    torch.testing.assert_close(
        entropy.double(), -(full.exp() * full.nan_to_num(neginf=0)).sum(1), rtol=1e-4, atol=1e-5
    )
    w = torch.randn(len(targets), generator=torch.Generator().manual_seed(seed))
    inputs = leaves(docs, head)
    ours, theirs = gradients((w * logp).sum(), inputs), gradients((w * wanted).sum(), inputs)
    for found, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-5)


def test_keeping_every_token_is_keeping_no_mask():
    docs, head = make_docs(15, 3)
    hidden, packed = pack(spread(docs, 3), ())
    everything = torch.arange(V, dtype=torch.int32).expand(*packed.input_ids.shape, V)
    masked = pack(spread(docs, 3), ())[1]
    masked.side["kept"] = everything
    for found, wanted in zip(
        policy_logps(hidden, head, masked, 0.8), policy_logps(hidden, head, packed, 0.8), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_drawn_token_counts_as_kept_and_tokens_that_nobody_kept_get_no_gradient():
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, D, generator=g), torch.randn(V, D, generator=g).requires_grad_()
    targets, kept = torch.tensor([4, 9]), torch.tensor([[5, -1, -1], [9, 5, 6]])
    logp, _, _ = kept_logprob(hidden, head, targets, kept)
    logits = hidden @ head.T
    wanted = [logits[0, 4] - logits[0, [4, 5]].logsumexp(0), logits[1, 9] - logits[1, [9, 5, 6]].logsumexp(0)]
    torch.testing.assert_close(logp, torch.stack(wanted))
    (slope,) = torch.autograd.grad(logp.sum(), head)
    assert slope.any(1).nonzero().flatten().tolist() == [4, 5, 6, 9]


def test_no_tensor_of_tokens_by_vocabulary_exists():
    from kernels.speed import _peak_bytes

    N, vocabulary, chunk = 256, 4096, 16
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, 4, generator=g).requires_grad_()
    head = torch.randn(vocabulary, 4, generator=g).requires_grad_()
    kept = torch.stack([torch.randperm(vocabulary, generator=g)[:64] for _ in range(N)]).int()

    def call() -> None:
        kept_logprob(hidden, head, kept[:, 0].long(), kept, chunk=chunk)[0].sum().backward()
        hidden.grad = head.grad = None

    assert _peak_bytes(call, "cpu") < 4 * N * vocabulary / 2


# -- what cannot be


def test_what_is_missing_is_named():
    docs, head = make_docs(16, 2)
    hidden, packed = pack(spread(docs, 3), ("old_logps",))
    with pytest.raises(DataError, match="'advantages'"):
        build()(hidden, head, packed)
    hidden, packed = pack(spread(docs, 3), ("advantages",))
    with pytest.raises(DataError, match="'reference_logps'"):
        build(kl_weight=0.1)(hidden, head, packed)
    with pytest.raises(DataError, match="sampling mask of a token is empty"):
        kept_logprob(torch.zeros(1, D), head, torch.tensor([2]), torch.tensor([[-1, -1]]))
    with pytest.raises(RecipeError, match=r"rollout\.max_new_tokens"):
        Grpo.from_section(SimpleNamespace(normalisation="constant"))
