"""Under bf16, what decides and what is added up over streams is computed in fp32, and without fp32 copies of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from v4_models import build, documents, relative, row

from kernels import registry
from kernels.routing import reference
from lab_utils.models.deepseek_v4 import hyper_connections
from lab_utils.models.deepseek_v4.mtp import predict


def rounded(seed: int, **options):
    """A model in bf16, and one in fp32 with the same rounded weights."""
    low = build(seed, **options).to(torch.bfloat16)
    full = build(seed, **options)
    full.load_state_dict(
        {name: tensor.to(full.state_dict()[name].dtype) for name, tensor in low.state_dict().items()}
    )
    return low, full


@pytest.mark.parametrize("seed", range(3))
def test_routing_decides_as_in_fp32(seed):
    low, full = rounded(seed)
    x = torch.randn(40, low.config.hidden_size, generator=torch.Generator().manual_seed(seed)).bfloat16()
    context = type("Context", (), {"balance": False})()
    ours = low.model.layers[1].mlp.gate(x, context)
    theirs = full.model.layers[1].mlp.gate(x.float(), context)
    assert ours.weights_Nk.dtype == torch.float32
    assert torch.equal(ours.experts_Nk, theirs.experts_Nk)
    torch.testing.assert_close(ours.weights_Nk, theirs.weights_Nk)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("given", [False, True])
def test_routing_equals_its_definition(dtype, given):
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(13, 6, generator=draw).to(dtype), torch.randn(5, 6, generator=draw).to(dtype)
    table = torch.rand(13, 5, generator=draw).argsort(1)[:, :2]
    chosen = {"experts_Nk": table} if given else {"bias_E": torch.randn(5, generator=draw)}
    results = []
    for name in ("torch", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with registry.force(routing=name):
            out = registry.get("routing", "cpu", dtype)(
                *leaves, k=2, scoring="sqrtsoftplus", scaling=1.5, want_scores=True, **chosen
            )
        ((out[1] * torch.arange(2)).sum() + out[2].square().sum()).backward()
        results.append([*out, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_score_that_underflows_has_a_finite_gradient():
    x = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[-200.0], [1.0]], requires_grad=True)
    experts = torch.tensor([[1]])
    _, weights, scores = reference.routing(
        x, weight, k=1, scoring="sqrtsoftplus", scaling=1.0, experts_Nk=experts, want_scores=True
    )
    (weights.sum() + scores.sum()).backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_hyper_connections_mix_in_fp32(seed):
    low, full = rounded(seed)
    n, D = low.config.hc_mult, low.config.hidden_size
    h = torch.randn(2, 9, n, D, generator=torch.Generator().manual_seed(seed)).bfloat16()
    x, (post, comb, _) = low.model.layers[0].attn_hc.collapse(h)
    x_full, (post_full, comb_full, kept) = full.model.layers[0].attn_hc.collapse(h.float())
    assert post.dtype == comb.dtype == torch.float32
    torch.testing.assert_close(post, post_full)
    torch.testing.assert_close(comb, comb_full)
    assert torch.equal(x, x_full.bfloat16())  # cast once, at the end
    mixed = low.model.layers[0].attn_hc.expand(x, (post, comb, h.flatten(0, 1)))
    expected = full.model.layers[0].attn_hc.expand(x.float(), (post_full, comb_full, kept))
    torch.testing.assert_close(mixed, expected.bfloat16(), rtol=2**-7, atol=1e-6)
    assert torch.equal(low.model.hc_head(h), full.model.hc_head(h.float()).bfloat16())


def plain_head(head, h_BTnD):
    u = h_BTnD.flatten(2)
    z = (u @ head.hc_fn.T) * (u.square().mean(-1, keepdim=True) + head.norm_eps).rsqrt()
    return ((torch.sigmoid(z * head.hc_scale + head.hc_base) + head.eps)[..., None] * h_BTnD).sum(2)


@pytest.mark.parametrize("chunk", [1 << 22, 500, 1])
def test_the_streams_last_collapse_is_the_formula_s_in_any_chunks(chunk, monkeypatch):
    monkeypatch.setattr(hyper_connections, "CHUNK_ELEMENTS", chunk)
    head = build(3).model.hc_head.double()
    draw = torch.Generator().manual_seed(0)
    n, width = head.hc_fn.shape
    h = torch.randn(2, 11, n, width // n, generator=draw, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 11, width // n, generator=draw, dtype=torch.float64)
    results = []
    for run in (head, lambda x: plain_head(head, x)):
        out = run(h)
        grads = torch.autograd.grad((out * target).sum(), [h, head.hc_fn, head.hc_base, head.hc_scale])
        results.append([out, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_the_streams_last_collapse_keeps_them_once():
    head = build(4).model.hc_head.bfloat16()
    h = torch.randn(1, 64, *(4, head.hc_fn.shape[1] // 4)).bfloat16().requires_grad_()
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        head(h)
    small = sum(p.numel() for p in head.parameters()) * 4 + 64 * 5 * 4
    assert sum(saved.values()) <= h.numel() * 2 + small


@pytest.mark.parametrize("seed", range(2))
def test_losses_of_the_head_are_computed_in_fp32(seed):
    low, full = rounded(seed, mtp_loss=0.3)
    rows = row(documents(seed, [17, 6]))
    context = low.begin(*(rows[key] for key in ("input_ids", "position_ids", "document_ids"))).context
    h = torch.randn(1, 23, low.config.hc_mult, low.config.hidden_size).bfloat16()
    found = predict(low.mtp[0], h, low.head_weight, context, rows["loss_weights"])
    # The only rounding is that of the states before the head.
    states = low.mtp[0].norm(low.mtp[0].hc_head(h)).float()[0]
    total = torch.zeros(())
    for start, stop in ((0, 17), (17, 23)):
        logits = states[start : stop - 2] @ full.head_weight.T
        ids, weights = rows["input_ids"][0, start + 2 : stop], rows["loss_weights"][0, start + 2 : stop]
        total = total + (weights * F.cross_entropy(logits, ids, reduction="none")).sum()
    assert found.loss.dtype == torch.float32
    assert relative(found.loss, total) < 1e-5


def test_a_bf16_model_stays_near_the_fp32_one_with_its_weights():
    low, full = rounded(5, mtp_loss=0.3)
    rows = row(documents(5, [21, 8]))
    with low.record_routing() as record:
        ours = low(**rows)
    theirs = full(**rows, routing=record)  # a choice that falls the other way is no matter of precision
    assert relative(ours.hidden_BTD.float(), theirs.hidden_BTD) < 0.1
    a, b = (output.auxiliary["mtp_loss"].total for output in (ours, theirs))
    assert a.item() == pytest.approx(b.item(), rel=0.05)
