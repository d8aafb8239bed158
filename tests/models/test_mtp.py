"""Multi-token prediction equals a plain implementation, inside documents, and comes and goes with the checkpoint."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from v4_models import build, documents, gradients, relative, row

from lab_utils.errors import CheckpointError, RecipeError
from lab_utils.models.deepseek_v4.counting import training_flops
from lab_utils.models.load import load_model, read_state_dict, save_pretrained
from lab_utils.models.presets import preset


def rms(x, weight=None, eps=1e-6):
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x if weight is None else x * weight


def hyper(h_TnD, hc, config):
    """Coefficients a, b, C of facts' mhc(h), token by token."""
    n, eps = config.hc_mult, config.hc_eps
    u = h_TnD.flatten(1)
    z = (u @ hc.fn.T) * (u.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
    a = torch.sigmoid(hc.scale[0] * z[:, :n] + hc.base[:n]) + eps
    b = 2 * torch.sigmoid(hc.scale[1] * z[:, n : 2 * n] + hc.base[n : 2 * n])
    c = (hc.scale[2] * z[:, 2 * n :] + hc.base[2 * n :]).view(-1, n, n).softmax(-1) + eps
    c = c / (c.sum(1, keepdim=True) + eps)
    for _ in range(config.hc_sinkhorn_iters - 1):
        c = c / (c.sum(2, keepdim=True) + eps)
        c = c / (c.sum(1, keepdim=True) + eps)
    return a, b, c


def rotate(x, cos, sin):
    """Adjacent pairs of the last 2R channels."""
    R = cos.shape[-1]
    plain, a, b = x[..., : -2 * R], x[..., -2 * R :: 2], x[..., -2 * R + 1 :: 2]
    return torch.cat([plain, torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)], -1)


def attention(x_TD, attn, model):
    T, config = len(x_TD), model.config
    cos, sin = model.rotary("main", torch.arange(T))
    q = rms(x_TD @ attn.q_a_proj.weight.T, attn.q_a_norm.weight) @ attn.q_b_proj.weight.T
    q = rotate(rms(q.view(T, config.num_attention_heads, -1)), cos[:, None], sin[:, None])
    kv = rotate(rms(x_TD @ attn.kv_proj.weight.T, attn.kv_norm.weight), cos, sin)
    outs = []
    for t in range(T):
        keys = kv[max(0, t + 1 - config.sliding_window) : t + 1]
        scores = torch.cat([q[t] @ keys.T * config.head_dim**-0.5, attn.sinks[:, None]], 1)
        outs.append(rotate(scores.softmax(1)[:, :-1] @ keys, cos[t], -sin[t]).flatten())
    grouped = torch.stack(outs).view(T, config.o_groups, -1)
    weight = attn.o_a_proj.weight.view(config.o_groups, config.o_lora_rank, -1)
    return torch.einsum("tgi,goi->tgo", grouped, weight).flatten(1) @ attn.o_b_proj.weight.T


def experts(x_TD, mlp, config):
    def swiglu(x, gate, up, down):
        limit = config.swiglu_limit
        return (F.silu((x @ gate.T).clamp(max=limit)) * (x @ up.T).clamp(-limit, limit)) @ down.T

    scores = F.softplus(x_TD @ mlp.gate.weight.T).sqrt()
    shared = mlp.shared_experts
    outs = []
    for x, s in zip(x_TD, scores, strict=True):
        chosen = (s + mlp.gate.e_score_correction_bias).topk(config.num_experts_per_tok).indices
        out = swiglu(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        for e in chosen:
            gate, up = mlp.experts.gate_up_proj[e].chunk(2)
            share = s[e] / s[chosen].sum() * config.routed_scaling_factor
            out = out + share * swiglu(x, gate, up, mlp.experts.down_proj[e])
        outs.append(out)
    return torch.stack(outs)


def plain_loss(model, ids_T, weights_T):
    """Σ w·nll over the depths for one document, from the streams that the main model hands to its head."""
    config, kept = model.config, []
    hook = model.model.hc_head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0]))
    T = len(ids_T)
    model(ids_T[None], torch.arange(T)[None], torch.zeros(1, T, dtype=torch.long), torch.zeros(1, T))
    hook.remove()
    h, total, hits, count = kept[0], 0.0, 0, 0
    for depth, block in enumerate(model.mtp):
        ahead = depth + 1
        if ahead >= T:
            break
        embedded = rms(model.model.embed_tokens.weight[ids_T[ahead:]], block.enorm.weight)
        x = rms(h[: T - ahead], block.hnorm.weight) @ block.h_proj.weight.T
        h = x + (embedded @ block.e_proj.weight.T)[:, None]
        a, b, c = hyper(h, block.attn_hc, config)
        x = rms((a[..., None] * h).sum(1), block.input_layernorm.weight)
        y = attention(x, block.self_attn, model)
        h = b[..., None] * y[:, None] + torch.einsum("tjk,tjd->tkd", c, h)
        a, b, c = hyper(h, block.ffn_hc, config)
        x = rms((a[..., None] * h).sum(1), block.post_attention_layernorm.weight)
        y = experts(x, block.mlp, config)
        h = b[..., None] * y[:, None] + torch.einsum("tjk,tjd->tkd", c, h)
        u, head = h.flatten(1), block.hc_head
        z = (u @ head.hc_fn.T) * (u.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        a = torch.sigmoid(head.hc_scale * z + head.hc_base) + config.hc_eps
        logits = rms((a[..., None] * h).sum(1), block.norm.weight) @ model.lm_head.weight.T
        for t in range(T - ahead - 1):
            target, weight = ids_T[t + ahead + 1], weights_T[t + ahead + 1]
            total = total + weight * F.cross_entropy(logits[t], target)
            hits += int(weight > 0 and logits[t].argmax() == target)
            count += int(weight > 0)
    return total, hits, count


@pytest.mark.parametrize("seed, depths", [(0, 1), (1, 1), (2, 1), (3, 2)])
def test_packed_rows_give_the_loss_and_gradients_of_each_document_alone_written_plainly(seed, depths):
    model = build(seed, {"num_nextn_predict_layers": depths}, mtp_loss=0.3)
    parts = documents(seed, [9, 1, 2, 14, 3])
    output = model(**row(parts, padding=4))
    found = output.auxiliary["mtp_loss"]
    expected, hits, count = (sum(column) for column in zip(*(plain_loss(model, *p) for p in parts)))
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.weight == 0.3
    accuracy = output.metrics["mtp_token_accuracy"]
    assert (float(accuracy.total), float(accuracy.count)) == (hits, count)
    ours, theirs = gradients(model, found.total), gradients(model, expected)
    reached = {name for name in theirs if theirs[name].abs().sum() > 0}
    assert {name for name in ours if ours[name].abs().sum() > 0} == reached
    assert reached >= {name for name, _ in model.named_parameters() if name.startswith("mtp.")}
    assert reached >= {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.kv_proj.weight",
    }
    for name in reached:
        assert relative(ours[name], theirs[name]) < 1e-3, name


@pytest.mark.parametrize("depths", [1, 2])
def test_what_the_loss_is_a_mean_over_is_known_before_the_forward_pass(depths):
    model = build(4, {"num_nextn_predict_layers": depths}, mtp_loss=0.3)
    rows = row(documents(4, [11, 2, 5, 1]), padding=3)
    known = model.auxiliary_counts(rows["position_ids"], rows["document_ids"], rows["loss_weights"])
    assert known["mtp_loss"].item() == pytest.approx(model(**rows).auxiliary["mtp_loss"].count.item())
    assert known["mtp_loss"] > 0


def test_documents_too_short_to_predict_give_no_loss_but_a_backward_pass():
    model = build(5, mtp_loss=0.3)
    found = model(**row(documents(5, [2, 1, 2]))).auxiliary["mtp_loss"]
    assert found.total == 0 and found.count == 0
    reached = gradients(model, found.total)
    assert "mtp.0.mlp.experts.down_proj" in reached and all(not g.any() for g in reached.values())


def test_recomputation_changes_nothing():
    rows = row(documents(6, [12, 7]), padding=2)
    plain, again = (build(6, mtp_loss=0.3, checkpointing=kind) for kind in ("none", "full"))
    expected = gradients(plain, plain(**rows).auxiliary["mtp_loss"].total)
    found = gradients(again, again(**rows).auxiliary["mtp_loss"].total)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_main_model_is_the_same_with_and_without_the_block():
    rows = row(documents(7, [13, 5]))
    with_block, without = build(7, mtp_loss=0.3), build(7)
    assert not any(name.startswith("mtp.") for name in without.state_dict())
    assert torch.equal(with_block(**rows).hidden_BTD, without(**rows).hidden_BTD)


def test_training_asks_for_loss_weights_and_generation_does_without():
    model = build(8, mtp_loss=0.3)
    rows = row(documents(8, [9]))
    rows.pop("loss_weights")
    with pytest.raises(ValueError, match="loss_weights"):
        model(**rows)
    with pytest.raises(ValueError, match="loss_weights"):
        model.auxiliary_counts(rows["position_ids"], rows["document_ids"])
    with torch.no_grad():
        assert "mtp_loss" not in model.eval()(**rows).auxiliary


NAMES = """enorm.weight hnorm.weight e_proj.weight h_proj.weight norm.weight hc_head.hc_fn hc_head.hc_base
    hc_head.hc_scale input_layernorm.weight post_attention_layernorm.weight attn_hc.fn attn_hc.base attn_hc.scale
    ffn_hc.fn ffn_hc.base ffn_hc.scale self_attn.q_a_proj.weight self_attn.q_a_norm.weight self_attn.q_b_proj.weight
    self_attn.kv_proj.weight self_attn.kv_norm.weight self_attn.o_a_proj.weight self_attn.o_b_proj.weight
    self_attn.sinks mlp.gate.weight mlp.gate.e_score_correction_bias mlp.experts.gate_up_proj mlp.experts.down_proj
    mlp.shared_experts.gate_proj.weight mlp.shared_experts.up_proj.weight mlp.shared_experts.down_proj.weight"""


def test_the_block_is_saved_and_loaded_and_transformers_passes_it_by(tmp_path):
    model = build(9, mtp_loss=0.3)
    save_pretrained(model, model.config, tmp_path / "out")
    saved = read_state_dict(tmp_path / "out")
    assert {name for name in saved if name.startswith("mtp.")} == {f"mtp.0.{name}" for name in NAMES.split()}
    again = load_model(str(tmp_path / "out"), mtp_loss=0.1, seed=3)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in saved.items())
    rows = row(documents(9, [20]))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        ours = again(**rows).hidden_BTD @ again.head_weight.T
        assert relative(ours, theirs(rows["input_ids"], use_cache=False).logits) < 1e-4


def test_a_checkpoint_without_the_block_gets_a_fresh_one_by_seed_and_says_so(tmp_path, caplog):
    model = build(10)
    save_pretrained(model, model.config, tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        one, two, other = (load_model(str(tmp_path / "out"), mtp_loss=0.3, seed=s) for s in (1, 1, 2))
    assert "start fresh" in caplog.text
    name = "mtp.0.e_proj.weight"
    assert torch.equal(one.state_dict()[name], two.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert all(torch.equal(one.state_dict()[n], t) for n, t in model.state_dict().items())
    assert 0.01 < one.mtp[0].e_proj.weight.std() < 0.03 and (one.mtp[0].enorm.weight == 1).all()


def test_half_a_block_is_refused(tmp_path):
    model = build(11, mtp_loss=0.3)
    state = {n: t for n, t in model.state_dict().items() if n != "mtp.0.e_proj.weight"}
    save_pretrained(state, model.config, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"mtp\.0\.e_proj\.weight is missing"):
        load_model(str(tmp_path / "out"), mtp_loss=0.3)


def test_a_model_without_such_a_block_refuses_the_loss():
    with pytest.raises(RecipeError, match="num_nextn_predict_layers"):
        build(12, {"num_nextn_predict_layers": 0}, mtp_loss=0.3)


@pytest.mark.parametrize("name, extra", [("pro", 11.80e9), ("flash", 5.44e9)])
def test_the_block_costs_what_it_should(name, extra):
    config = preset(name)
    without, with_block = (training_flops(config, [4096], mtp=mtp) for mtp in (False, True))
    assert with_block - without == pytest.approx(extra, rel=5e-4)


def test_the_model_counts_its_own_block():
    plain, with_block = build(13), build(13, mtp_loss=0.3)
    assert with_block.flops_per_token([10, 5]) > plain.flops_per_token([10, 5])
    own = sum(p.numel() for name, p in with_block.named_parameters() if name.startswith("mtp."))
    from lab_utils.models.deepseek_v4.counting import parameters_mtp

    assert own == parameters_mtp(with_block.config)
