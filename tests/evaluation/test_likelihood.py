"""Log-likelihoods of packed documents against each document alone, by the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.data.documents import Document, Encoding, encode_row
from lab_utils.data.tokenizer import load_tokenizer
from lab_utils.evaluation.likelihood import document_likelihoods, pair_likelihoods, text_likelihoods
from lab_utils.models.load import load_model

ENCODING = Encoding(load_tokenizer())


@pytest.fixture(scope="module")
def model():
    return load_model("base:tiny", dtype=torch.float32).eval()


@torch.no_grad()
def alone(model, ids: list[int], weights: list[float]) -> float:
    """Σ w·log p, one document in a batch of its own, softmax over the whole vocabulary in fp64."""
    T = len(ids)
    hidden = model(
        torch.tensor([ids]), torch.arange(T)[None], torch.zeros(1, T, dtype=torch.long)
    ).hidden_BTD[0]
    logp = (hidden.double() @ model.head_weight.double().T).log_softmax(-1)
    return sum(w * float(logp[t - 1, ids[t]]) for t, w in enumerate(weights) if t and w)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(16, 70), st.integers(0, 10_000))
def test_packing_changes_no_documents_likelihood(model, lengths, row_tokens, seed):
    draw = torch.Generator().manual_seed(seed)
    documents = [
        Document(
            torch.randint(20, 2000, (n,), generator=draw).tolist(),
            (torch.rand(n, generator=draw) * (torch.rand(n, generator=draw) > 0.3)).tolist(),
            "",
        )
        for n in lengths
    ]
    found = document_likelihoods(model, documents, row_tokens=row_tokens, batch_tokens=100)
    for document, likelihood in zip(documents, found, strict=True):
        assert likelihood.logp == pytest.approx(
            alone(model, document.input_ids, document.loss_weights), abs=2e-3
        )
        assert likelihood.tokens == pytest.approx(sum(document.loss_weights[1:]), abs=1e-5)


def test_no_documents_have_no_likelihoods(model):
    assert document_likelihoods(model, [], row_tokens=64) == []


def test_a_conversation_is_weighed_as_in_training(model):
    row = {
        "messages": [
            {"role": "user", "content": "Tell me the half of 26."},
            {"role": "assistant", "content": "13"},
        ]
    }
    document = encode_row(row, "messages", ENCODING)
    (found,) = text_likelihoods(model, ENCODING, [row], "messages", row_tokens=16)
    assert found.tokens == sum(document.loss_weights) == 3  # 13 is two tokens here, then the end
    assert found.logp == pytest.approx(alone(model, document.input_ids, document.loss_weights), abs=1e-3)


def test_long_text_is_cut_as_in_training_and_added_up(model):
    row = {"text": "The word kiwi stands in double quotes. " * 12}
    ids = encode_row(row, "text", ENCODING).input_ids
    (found,) = text_likelihoods(model, ENCODING, [row], "text", row_tokens=40)
    pieces = [ids[i : i + 40] for i in range(0, len(ids), 40)]
    assert len(pieces) > 2
    assert found.tokens == len(ids) - len(pieces)
    assert found.logp == pytest.approx(sum(alone(model, p, [1.0] * len(p)) for p in pieces), abs=5e-3)


def test_a_pair_is_weighed_on_its_answers_alone(model):
    """What the assistant says inside the prompt bears no weight: the means of both answers are comparable."""
    row = {
        "prompt": [
            {"role": "user", "content": "Say a word."},
            {"role": "assistant", "content": "goat"},
            {"role": "user", "content": "Again."},
        ],
        "chosen": [{"role": "assistant", "content": "goat"}],
        "rejected": [{"role": "assistant", "content": "a sharp knife"}],
    }
    (pair,) = pair_likelihoods(model, ENCODING, [row], row_tokens=64)
    prompt = ENCODING.prompt_ids({"messages": row["prompt"]})
    for side in ("chosen", "rejected"):
        ids = [*prompt, *ENCODING.tokenizer.encode(row[side][0]["content"]), ENCODING.tokenizer.eos_id]
        weights = [float(i >= len(prompt)) for i in range(len(ids))]
        assert getattr(pair, side).tokens == sum(weights)
        assert getattr(pair, side).logp == pytest.approx(alone(model, ids, weights), abs=1e-3)
