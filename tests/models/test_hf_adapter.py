"""Any causal LM of transformers through the generic adapter: a small Qwen3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lab_utils.errors import CheckpointError
from lab_utils.models.load import describe, load_model


@pytest.fixture(scope="module", params=[False, True], ids=["own-head", "tied-head"])
def folder(request, tmp_path_factory) -> Path:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=request.param,
    )
    path = tmp_path_factory.mktemp("qwen3")
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def logits(model, ids_BT, position_BT, document_BT):
    return model(ids_BT, position_BT, document_BT).hidden_BTD @ model.head_weight.T


def test_logits_are_those_of_transformers(folder):
    ids = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(1))
    position = torch.arange(19).expand(2, -1)
    ours = logits(load_model(str(folder)), ids, position, torch.zeros_like(ids))
    theirs = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_packed_document_has_the_logits_it_has_alone(folder):
    draw = torch.Generator().manual_seed(2)
    documents = [torch.randint(0, 97, (n,), generator=draw) for n in (7, 12, 5)]
    ids = torch.cat(documents)[None]
    position = torch.cat([torch.arange(len(d)) for d in documents])[None]
    document = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)])[None]
    model, start = load_model(str(folder)), 0
    packed = logits(model, ids, position, document)[0]
    for tokens in documents:
        T = len(tokens)
        alone = logits(model, tokens[None], torch.arange(T)[None], torch.zeros(1, T, dtype=torch.long))[0]
        torch.testing.assert_close(packed[start : start + T], alone, rtol=1e-4, atol=1e-5)
        start += T


def test_every_weight_gets_a_gradient_and_the_state_has_the_names_of_the_wrapped_model(folder):
    model = load_model(str(folder), checkpointing="full")
    ids = torch.randint(0, 97, (1, 16), generator=torch.Generator().manual_seed(4))
    logits(model, ids, torch.arange(16)[None], torch.zeros_like(ids)).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    wrapped = Qwen3ForCausalLM.from_pretrained(folder)
    assert set(model.state_dict()) == set(wrapped.state_dict())
    model.load_state_dict(wrapped.state_dict())


def test_parameters_are_counted_as_transformers_has_them(folder):
    wrapped = Qwen3ForCausalLM.from_pretrained(folder)
    assert describe(str(folder))["parameters"] == sum(p.numel() for p in wrapped.parameters())


def test_a_folder_that_transformers_does_not_know_gets_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(CheckpointError, match="transformers can't load it as a causal LM"):
        load_model(str(tmp_path))
