"""Warm-up of the lightning indexer: dense attention, a loss over all visible entries, and nothing else learns."""

from __future__ import annotations

import pytest
import torch
from v4_models import build, documents, gradients, row

from lab_utils.errors import RecipeError
from lab_utils.models.deepseek_v4.counting import training_flops
from lab_utils.models.load import load_model
from lab_utils.models.presets import preset
from lab_utils.recipe import Recipe

LENGTHS = [25, 2, 14]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_warm_up_attends_and_compares_all_entries(seed):
    rows = row(documents(seed, LENGTHS), padding=3)
    warm, sparse = build(seed, indexer_phase="warmup"), build(seed)
    dense = build(seed, {"index_topk": 64})  # as many as there are: no selection
    found, expected, narrow = (model(**rows) for model in (warm, dense, sparse))
    assert torch.equal(found.hidden_BTD, expected.hidden_BTD)
    ours, theirs = found.auxiliary["indexer_kl"], expected.auxiliary["indexer_kl"]
    assert torch.equal(ours.total, theirs.total) and torch.equal(ours.count, theirs.count)
    assert not torch.equal(narrow.hidden_BTD, found.hidden_BTD)
    assert narrow.auxiliary["indexer_kl"].total != ours.total
    assert narrow.auxiliary["indexer_kl"].count == ours.count
    assert warm.auxiliary_counts(rows["position_ids"], rows["document_ids"])["indexer_kl"] == ours.count
    with torch.no_grad():
        assert torch.equal(warm.eval()(**rows).hidden_BTD, expected.hidden_BTD)


def plain_kl(model, rows) -> torch.Tensor:
    """Σ KL(p ‖ softmax I) over all visible entries of the one CSA layer, query by query (one document)."""
    layer, kept = model.model.layers[1].self_attn, {}
    pool, indexer = layer.compressor, layer.compressor.indexer
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: kept.update(x=inputs[0][0], context=inputs[1])),
        layer.q_a_norm.register_forward_hook(lambda _m, _i, out: kept.update(q=out[0])),
    ]
    model(**rows)
    for hook in hooks:
        hook.remove()
    x, cq, context, K = kept["x"], kept["q"], kept["context"], model.config.head_dim
    T, heads, rate = len(x), model.config.num_attention_heads, pool.rate
    cos, sin = (a[0] for a in context.angles("compress"))

    def rotate(v, cos, sin):
        R = cos.shape[-1]
        a, b = v[..., -2 * R :: 2], v[..., -2 * R + 1 :: 2]
        return torch.cat(
            [v[..., : -2 * R], torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)], -1
        )

    q = (cq @ layer.q_b_proj.weight.T).view(T, heads, K)
    q = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    q = rotate(q, cos[:, None], sin[:, None])
    kv = rotate(layer.kv_norm(layer.kv_proj(x)), cos, sin)
    entries = pool.entries(x[None], context)[0]
    qi, keys, weights = (part[0] for part in indexer(x[None], cq[None], x[None], context))
    total = torch.zeros(())
    for t in range(T):
        visible = (t + 1) // rate
        if not visible:
            continue
        window = kv[max(0, t + 1 - model.config.sliding_window) : t + 1]
        seen = torch.cat([entries[:visible], window])
        scores = torch.cat([q[t] @ seen.T * K**-0.5, layer.sinks[:, None]], 1)
        mass = scores.softmax(1)[:, :visible].sum(0).detach()
        target = mass / mass.sum()
        index = (weights[t][:, None] * (qi[t] @ keys[:visible].T).relu()).sum(0)
        total = total + (target * (target.log() - index.log_softmax(0))).sum()
    return total


@pytest.mark.parametrize("seed", [3, 4])
def test_the_warm_up_loss_is_the_formula_s_and_trains_the_indexer_alone(seed):
    model = build(seed, indexer_phase="warmup")
    rows = row(documents(seed, [29]))
    output = model(**rows)
    found = output.auxiliary["indexer_kl"]
    expected = plain_kl(model, rows)
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert not output.hidden_BTD.requires_grad
    ours, theirs = gradients(model, found.total), gradients(model, expected)
    indexer = {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert set(ours) == indexer == set(theirs) and len(indexer) == 6
    for name in indexer:
        assert ours[name].any() and torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5), name


def test_warm_up_leaves_everything_else_as_it_is():
    options = {"mtp_loss": 0.3, "balance_loss": 0.1, "balance_rate": 0.01}
    model = build(5, indexer_phase="warmup", checkpointing="full", **options)
    rows = row(documents(5, LENGTHS))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = model(**rows)
    counts = model.auxiliary_counts(rows["position_ids"], rows["document_ids"], rows["loss_weights"])
    assert set(output.auxiliary) == set(counts) == {"indexer_kl"}
    output.auxiliary["indexer_kl"].total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    metrics = model.finish_step(lambda load: load, True)
    assert metrics["moe/cv_mean"].value > 0
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert any(name.startswith("mtp.") for name in before)


def test_warm_up_survives_loading(tmp_path):
    model = load_model("preset:tiny", indexer_phase="warmup", dtype="bfloat16")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".indexer." in name}


def test_a_recipe_whose_warm_up_would_train_nothing_is_refused():
    recipe = Recipe.load("sft_tiny")
    recipe.with_changes({"model.indexer_phase": "warmup"})
    with pytest.raises(RecipeError, match=r"model\.indexer_loss is 0"):
        recipe.with_changes({"model.indexer_phase": "warmup", "model.indexer_loss": 0})


def test_only_deepseek_v4_has_these_signals(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    for signal in ({"mtp_loss": 0.3}, {"balance_rate": 0.001}, {"indexer_phase": "warmup"}):
        with pytest.raises(RecipeError, match=f"no model.{next(iter(signal))}"):
            load_model(str(tmp_path), **signal)


def test_warm_up_is_counted_as_forward_passes_and_a_trained_indexer():
    config = preset("flash")
    trained = training_flops(config, [4096], indexer_trained=True)
    warm = training_flops(config, [4096], indexer_trained=True, indexer_warmup=True)
    # Forward is a third; the indexer's 1.25 GF of backward stay; dense attention sees 511.75 entries for 383.88.
    dense = 2 * 2 * 21 * 64 * 512 * (511.75 - 383.875)
    indexer = 1.5 * 1.25497344e9
    assert warm == pytest.approx((trained - indexer) / 3 + dense + indexer, rel=1e-5)
