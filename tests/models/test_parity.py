"""The training model equals transformers' DeepSeek-V4 on the same weights: logits, gradients, and there and back."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV4Config, DeepseekV4ForCausalLM

from lab_utils.models.deepseek_v4.model import DeepseekV4
from lab_utils.models.load import load_model, save_pretrained

S, C, H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def random_config(seed: int) -> DeepseekV4Config:
    """A small configuration with all three layer types, hash and score routing, and odd sizes."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=draw))]

    kinds = [S, C, H, C] if seed % 2 else [C, H, S]
    return DeepseekV4Config(
        architectures=["DeepseekV4ForCausalLM"],
        vocab_size=97,
        hidden_size=pick(32, 48),
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        mlp_layer_types=["hash_moe"] + ["moe"] * (len(kinds) - 1),
        num_attention_heads=4,
        head_dim=pick(16, 24),
        partial_rotary_factor=0.5,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        n_routed_experts=pick(4, 6),
        num_experts_per_tok=2,
        moe_intermediate_size=pick(8, 20),
        compress_rates={C: pick(2, 4), H: pick(8, 12)},
        sliding_window=pick(8, 16),
        # With many heads no score is exactly zero: transformers leaves ties to topk's memory layout.
        index_n_heads=16,
        index_head_dim=16,
        index_topk=pick(3, 5),
        hc_sinkhorn_iters=pick(3, 20),
        max_position_embeddings=256,
        attn_implementation="eager",
    )


def pair(seed: int, folder) -> tuple[DeepseekV4, DeepseekV4ForCausalLM]:
    """Ours and transformers' on the same random weights, spread wide enough that every part matters."""
    torch.manual_seed(seed)
    config = random_config(seed)
    theirs = DeepseekV4ForCausalLM(config).float()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            tensor.normal_(std=0.3 if tensor.ndim > 1 else 0.5)
            if "norm" in name:
                tensor.add_(1.0)
        for name, tensor in theirs.named_buffers():
            if name.endswith("tid2eid"):
                tensor.copy_(torch.randint(config.n_routed_experts, tensor.shape))
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.1)
    save_pretrained(theirs.state_dict(), config, folder)
    return load_model(str(folder), dtype=torch.float32), theirs


def rows(lengths: list[int], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One packed row of documents of these lengths: ids, positions, documents ``[1, T]``."""
    ids = torch.randint(0, vocabulary, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return ids, positions, documents


def logits(model, ids, positions, documents) -> torch.Tensor:
    return model(ids, positions, documents).hidden_BTD @ model.head_weight.T


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("T", [1, 7, 37, 75])
def test_logits_equal_transformers(seed, T, tmp_path):
    ours, theirs = pair(seed, tmp_path / "m")
    ids, positions, documents = rows([T], 97)
    with torch.no_grad():
        assert relative(logits(ours, ids, positions, documents), theirs(ids, use_cache=False).logits) < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_gradients_equal_transformers_but_for_the_indexer(seed, tmp_path):
    ours, theirs = pair(seed, tmp_path / "m")
    ids, positions, documents = rows([61], 97)
    target = torch.randn(1, 61, 97)
    (logits(ours, ids, positions, documents) * target).sum().backward()
    (theirs(ids, use_cache=False).logits * target).sum().backward()
    expected = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        if ".indexer." in name:
            assert expected[name].grad is None
            continue
        assert relative(parameter.grad, expected[name].grad) < 1e-3, name
        compared += 1
    assert compared > 40


@pytest.mark.parametrize("seed", range(4))
def test_a_packed_row_gives_each_document_the_logits_it_has_alone(seed, tmp_path):
    ours, _ = pair(seed, tmp_path / "m")
    lengths = [19, 1, 33, 8, 14]
    ids, positions, documents = rows(lengths, 97)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    positions = torch.cat([positions, torch.arange(5)[None]], 1)
    documents = torch.cat([documents, torch.full((1, 5), -1)], 1)
    with torch.no_grad():
        together = logits(ours, padded, positions, documents)
        assert torch.isfinite(together).all()
        start = 0
        for n in lengths:
            part = ids[:, start : start + n]
            alone = logits(ours, part, torch.arange(n)[None], torch.zeros(1, n, dtype=torch.long))
            assert relative(together[:, start : start + n], alone) < 1e-5
            start += n


def test_index_scores_that_are_all_zero_select_the_same_entries_packed_and_alone(tmp_path):
    ours, _ = pair(2, tmp_path / "m")
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("weights_proj.weight"):
                parameter.zero_()
        ids, positions, documents = rows([30, 41], 97)
        together = logits(ours, ids, positions, documents)[:, 30:]
        alone = logits(ours, ids[:, 30:], positions[:, 30:], torch.zeros(1, 41, dtype=torch.long))
        assert relative(together, alone) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_a_later_token_changes_nothing_before_it(seed, tmp_path):
    ours, _ = pair(seed, tmp_path / "m")
    ids, positions, documents = rows([53], 97)
    with torch.no_grad():
        before = logits(ours, ids, positions, documents)
        for t in (5, 24, 52):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % 97
            after = logits(ours, changed, positions, documents)
            assert relative(after[:, :t], before[:, :t]) < 1e-6 if t else True
            assert relative(after[:, t:], before[:, t:]) > 1e-4


def test_the_indexer_learns_from_its_own_loss_and_teaches_nothing_else(tmp_path):
    ours, _ = pair(1, tmp_path / "m")
    ids, positions, documents = rows([40, 29], 97)
    output = ours(ids, positions, documents)
    kl = output.auxiliary["indexer_kl"]
    assert kl.total > 0 and kl.count > 0
    kl.total.backward()
    moved = {name for name, p in ours.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    indexer = {name for name, _ in ours.named_parameters() if ".indexer." in name}
    assert moved == indexer and indexer


@pytest.mark.parametrize("seed", range(4))
def test_the_count_of_the_indexer_loss_is_known_before_the_forward_pass(seed, tmp_path):
    ours, _ = pair(seed, tmp_path / "m")
    torch.manual_seed(seed)
    ids, positions, documents = rows(torch.randint(1, 40, (4,)).tolist(), 97)
    documents[:, -5:] = -1  # padding counts for nothing
    kl = ours(ids, positions, documents).auxiliary.get("indexer_kl")
    assert float(ours.auxiliary_counts(positions, documents)["indexer_kl"]) == (
        float(kl.count) if kl else 0.0
    )


def test_checkpointing_changes_memory_not_gradients(tmp_path):
    ours, _ = pair(1, tmp_path / "m")
    again = load_model(str(tmp_path / "m"), dtype=torch.float32, checkpointing="full")
    ids, positions, documents = rows([30, 21], 97)
    for model in (ours, again):
        model.train()
        logits(model, ids, positions, documents).square().sum().backward()
    expected = dict(ours.named_parameters())
    for name, parameter in again.named_parameters():
        if expected[name].grad is not None:
            assert torch.equal(parameter.grad, expected[name].grad), name


def test_a_cast_to_bfloat16_spares_the_balance_bias_and_keeps_the_logits_near(tmp_path):
    ours, _ = pair(1, tmp_path / "m")
    ids, positions, documents = rows([45], 97)
    with torch.no_grad():
        expected = logits(ours, ids, positions, documents)
        cast = ours.to(torch.bfloat16)
        biases = [b for n, b in cast.named_buffers() if n.endswith("e_score_correction_bias")]
        assert biases and all(b.dtype == torch.float32 for b in biases)
        assert torch.isfinite(logits(cast, ids, positions, documents).float()).all()
        assert relative(logits(cast, ids, positions, documents).float(), expected) < 0.8


def test_saved_weights_load_in_transformers_with_equal_logits(tmp_path):
    model = load_model("preset:tiny", dtype=torch.float32, seed=3)
    save_pretrained(model, model.config, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    ids, positions, documents = rows([70], 2048)
    with torch.no_grad():
        assert relative(logits(model, ids, positions, documents), theirs(ids, use_cache=False).logits) < 1e-4


def test_the_same_seed_gives_the_same_weights():
    one, two = (load_model("preset:tiny", dtype=torch.float32, seed=5).state_dict() for _ in range(2))
    other = load_model("preset:tiny", dtype=torch.float32, seed=6).state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
