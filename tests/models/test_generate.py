"""Greedy generation answers prompts of different lengths as each would be answered alone."""

import pytest
import torch

from lab_utils.models.generate import greedy_generate
from lab_utils.models.load import load_model


@pytest.fixture(scope="module")
def model():
    return load_model("base:tiny", dtype=torch.float32).eval()


def alone(model, prompt: list[int], steps: int, eos: int) -> list[int]:
    """The definition: the whole prefix again for every token."""
    ids = list(prompt)
    for _ in range(steps):
        T = len(ids)
        with torch.no_grad():
            hidden = model(
                torch.tensor([ids]), torch.arange(T)[None], torch.zeros(1, T, dtype=torch.long)
            ).hidden_BTD
        token = int((hidden[0, -1] @ model.head_weight.T).argmax())
        if token == eos:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_a_batch_is_answered_as_each_prompt_alone(model):
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(20, 2000, (n,), generator=draw).tolist() for n in (3, 70, 17, 64, 5)]
    found = greedy_generate(model, prompts, max_new_tokens=12, eos_id=1)
    assert found == [alone(model, prompt, 12, 1) for prompt in prompts]


def test_the_end_token_ends_an_answer(model):
    prompt = [0, 100, 200, 300]
    free = alone(model, prompt, 6, -1)
    end = next(token for token in free if token != free[0])  # any token may play the end token's part
    found = greedy_generate(model, [prompt], max_new_tokens=8, eos_id=end)
    assert found == [free[: free.index(end)]]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        greedy_generate(model, [[]], max_new_tokens=1, eos_id=1)
