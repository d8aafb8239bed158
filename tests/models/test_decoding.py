"""Decoding with a key-value cache says what the whole text would say, token for token."""

import pytest
import torch

from lab_utils.models.decoding import Recomputing
from lab_utils.models.deepseek_v4 import cpu_step
from lab_utils.models.generate import Request, Sampling, generate, greedy_generate
from tests.models.v4_models import C, H, V, build

END = V  # no token: every answer takes its whole budget


def whole(model, ids: list[int]) -> torch.Tensor:
    """Logits behind every token of a text, ``[T, V]``, computed all at once."""
    T = len(ids)
    with torch.no_grad():
        hidden = model(
            torch.tensor([ids]), torch.arange(T)[None], torch.zeros(1, T, dtype=torch.long)
        ).hidden_BTD
    return hidden[0] @ model.head_weight.T


def prompts(seed: int, count: int, longest: int = 50) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [torch.randint(0, V, (n,), generator=draw).tolist() for n in lengths]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("seed", range(8))
def test_greedy_answers_are_those_of_the_whole_text(seed):
    # In fp64 no two logits are so close that rounding could choose between them. 8 × 25 prompts; windows wrap, entries
    # close, and from the fourth entry on the indexer selects.
    model = build(seed).double().eval()
    asked = prompts(seed, 25)
    answers = greedy_generate(model, asked, max_new_tokens=20, eos_id=END)
    for prompt, answer in zip(asked, answers, strict=True):
        logits_TV = whole(model, prompt + answer)
        assert len(answer) == 20
        assert answer == logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_in_fp32_every_token_is_the_best_but_for_rounding(seed):
    # The step of few calls that a CPU takes in this precision.
    model = build(seed).eval()
    asked = prompts(10 + seed, 12)
    samples = generate(
        model,
        [Request(prompt, i, 30) for i, prompt in enumerate(asked)],
        sampling=Sampling(0.0),
        eos_id=END,
        slots=7,
        want_routing=True,
    )
    for prompt, sample in zip(asked, samples, strict=True):
        with model.record_routing() as record:
            logits_TV = whole(model, prompt + sample.tokens[:-1])[len(prompt) - 1 :]
        chosen_T = logits_TV.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        assert (logits_TV.amax(1) - chosen_T).max() <= 1e-4 * logits_TV.abs().max()
        routing = record.to_rows(1)[0]
        assert torch.equal(sample.routing.sort(-1).values, routing.sort(-1).values)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_logits_of_every_step_are_those_of_the_whole_text(dtype, tolerance):
    model = build(3, {"index_topk": 64}).to(dtype).eval()
    texts = prompts(5, 6, longest=40)
    decoding = model.start_decoding()
    first = [max(1, len(text) // 3) for text in texts]
    found = [[row] for row in decoding.prefill([t[:n] for t, n in zip(texts, first)]).logits_RV]
    order = sorted(range(6), key=lambda i: first[i] - len(texts[i]))  # the longest remainder first
    decoding = model.start_decoding()
    decoding.prefill([texts[i][: first[i]] for i in order])
    for step in range(max(len(t) - n for t, n in zip(texts, first))):
        going = [i for i in order if first[i] + step < len(texts[i])]
        logits_RV = decoding.step([texts[i][first[i] + step] for i in going]).logits_RV
        for row, i in zip(logits_RV, going, strict=True):
            found[i].append(row)
    for text, n, rows in zip(texts, first, found, strict=True):
        assert close(torch.stack(rows), whole(model, text).float()[n - 1 :], tolerance)


def test_answers_do_not_depend_on_what_else_is_sampled():
    model = build(1).double().eval()
    requests = [Request(p, 10 + i, 3 + i % 20) for i, p in enumerate(prompts(1, 12))]
    sampling = Sampling(0.8, 0.9, 0, seed=4)

    def sampled(slots, some=requests):
        return generate(model, some, sampling=sampling, eos_id=5, slots=slots, want_routing=True)

    together = sampled(64)
    for others in (sampled(3), [sampled(1, [request])[0] for request in requests]):
        for one, other in zip(together, others, strict=True):
            assert one.tokens == other.tokens
            assert torch.equal(one.routing, other.routing)
            assert all(map(torch.equal, one.kept, other.kept))
    assert any(sample.finished for sample in together) and not all(sample.finished for sample in together)


def test_the_cache_is_no_different_from_recomputing():
    model = build(2).double().eval()
    asked = prompts(2, 8)
    # Several answers to one prompt share its prefill.
    requests = [Request(p, i, 15) for i, p in enumerate([*asked, asked[1], asked[1], asked[4]])]
    options = {"sampling": Sampling(1.0, seed=3), "eos_id": 7, "slots": 4, "want_routing": True}
    cached = generate(model, requests, **options)
    again = generate(model, requests, **options, decoding=Recomputing(model))
    for one, other in zip(cached, again, strict=True):
        assert one.tokens == other.tokens
        assert torch.equal(one.routing, other.routing)
        assert torch.allclose(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-6, atol=1e-7)


def test_an_answer_goes_on_where_it_was_left():
    model = build(4).double().eval()
    requests = [Request(p, i, 20) for i, p in enumerate(prompts(3, 6))]
    sampling = Sampling(1.0, top_k=9, seed=1)
    options = {"sampling": sampling, "eos_id": END, "want_routing": True}
    whole_samples = generate(model, requests, **options)
    cut = [
        Request(r.prompt, r.key, 20, s.tokens[: 4 * i], s.logprobs[: 4 * i])
        for i, (r, s) in enumerate(zip(requests, whole_samples, strict=True))
    ]
    for one, other in zip(whole_samples, generate(model, cut, **options), strict=True):
        assert one.tokens == other.tokens
        assert torch.equal(one.routing, other.routing)
        assert all(map(torch.equal, one.kept, other.kept))


def test_routing_is_that_of_the_whole_text():
    model = build(6).double().eval()
    requests = [Request(p, i, 12) for i, p in enumerate(prompts(6, 5))]
    samples = generate(model, requests, sampling=Sampling(0.0), eos_id=END, want_routing=True)
    for request, sample in zip(requests, samples, strict=True):
        ids = request.prompt + sample.tokens[:-1]
        with torch.no_grad(), model.record_routing() as record:
            model(
                torch.tensor([ids]), torch.arange(len(ids))[None], torch.zeros(1, len(ids), dtype=torch.long)
            )
        assert torch.equal(sample.routing, record.to_rows(1)[0])


def test_long_answers_outgrow_the_room_that_was_made():
    model = build(0, {"compress_rates": {C: 2, H: 4}, "index_topk": 5, "max_position_embeddings": 1024})
    model = model.double().eval()
    asked = prompts(9, 3, longest=5)
    for prompt, answer in zip(
        asked, greedy_generate(model, asked, max_new_tokens=300, eos_id=END), strict=True
    ):
        logits_TV = whole(model, prompt + answer)
        assert answer == logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_the_dense_warm_up_attends_every_entry_in_decoding_too():
    model = build(7, indexer_phase="warmup").double().eval()
    asked = prompts(7, 4)
    for prompt, answer in zip(
        asked, greedy_generate(model, asked, max_new_tokens=16, eos_id=END), strict=True
    ):
        assert answer == whole(model, prompt + answer)[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_streams_that_are_mixed_hard_stay_finite_in_the_step_of_few_calls():
    model = build(5).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attn_hc.base[8:] += 120.0 * torch.eye(4).flatten()  # e^120 is beyond fp32
    decoding, text = model.start_decoding(), prompts(5, 1)[0]
    decoding.prefill([text])
    found = [decoding.step([token]).logits_RV[0] for token in (3, 9, 4)]
    assert close(torch.stack(found), whole(model, [*text, 3, 9, 4])[-3:], 1e-4)


@pytest.mark.parametrize(
    ("name", "value"), [("MASKED", 0), ("ONE_THREAD", 0), ("LOOPED", 0), ("_one_product", lambda a, b: None)]
)
def test_what_larger_models_and_batches_take_gives_the_same_logits(monkeypatch, name, value):
    """Selected keys are copied, products are torch's, experts grouped, output projections two."""

    def logits() -> torch.Tensor:
        decoding, texts = model.start_decoding(), prompts(11, 5, longest=60)
        decoding.prefill(texts)
        found = [decoding.step([(7 * i + row) % V for row in range(5)]).logits_RV for i in range(12)]
        return torch.stack(found)

    model = build(3).eval()
    expected = logits()
    monkeypatch.setattr(cpu_step, name, value)
    assert close(logits(), expected, 1e-5)
