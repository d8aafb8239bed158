"""``lab bench generate``: greedy decoding with our key-value cache and with transformers' ``generate``, in turn, on the
same weights and prompts, in one process.

All prompts of a batch have one length: transformers would have to pad others on the left, which its DeepSeek-V4 does
not keep apart from the text.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 32)
LENGTHS = ((64, 64), (512, 128))  # a short question; one with a document or some turns before it


def bench_generate(
    source: str = "base:tiny",
    batches: tuple[int, ...] = BATCHES,
    lengths: tuple[tuple[int, int], ...] = LENGTHS,
    *,
    rounds: int = 3,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    on_row: Callable[[dict], None] | None = None,
) -> list[dict[str, Any]]:
    """Tokens generated a second, prefill included.

    Args:
        source: a model as recipes name it.
        batches: prompts answered together.
        lengths: tokens of each prompt (random ids) and of each answer (no end token).
        rounds: how often the two are measured in turn; speeds are medians.
        threads: CPU threads; absent: torch's own choice.
        device: ``cpu`` or ``cuda``.
        dtype: working precision of both.
        on_row: called with each finished row, for progress.

    Returns:
        Rows of ``lengths``, ``batch``, ``ours_tokens_per_s``, ``peer_tokens_per_s``, ``ratio`` and ``same_tokens``, the
        share of answers that both give alike: rounding may choose between two logits that are all but equal.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lab_utils.models.generate import greedy_generate
    from lab_utils.models.load import load_model, save_pretrained

    if threads:
        torch.set_num_threads(threads)
    precision = getattr(torch, dtype)
    model = load_model(source, dtype=precision, seed=0).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model.state_dict(), model.config, Path(folder))
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=precision, attn_implementation="eager")
    peer = peer.to(device).eval()
    peer.generation_config.eos_token_id = None

    def ours(prompts: list[list[int]], new: int) -> list[list[int]]:
        return greedy_generate(model, prompts, max_new_tokens=new, eos_id=-1)

    def theirs(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            found = peer.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return found[:, len(prompts[0]) :].tolist()

    draw = torch.Generator().manual_seed(0)
    rows = []
    for (length, new), batch in product(lengths, batches):
        prompts = torch.randint(2, model.config.vocab_size, (batch, length), generator=draw).tolist()
        answers = [ours(prompts, new), theirs(prompts, new)]  # and both are warm
        timed = [[_seconds(side, prompts, new, device) for side in (ours, theirs)] for _ in range(rounds)]
        seconds = [statistics.median(side) for side in zip(*timed, strict=True)]
        speeds = [batch * new / each for each in seconds]
        same = sum(a == b for a, b in zip(*answers, strict=True)) / batch
        row = {
            "lengths": f"{length} + {new}",
            "batch": batch,
            "ours_tokens_per_s": speeds[0],
            "peer_tokens_per_s": speeds[1],
            "ratio": speeds[0] / speeds[1],
            "same_tokens": same,
        }
        rows.append(row)
        if on_row:
            on_row(row)
    return rows


def _seconds(side: Callable[..., Any], prompts: list[list[int]], new: int, device: str) -> float:
    import torch

    start = time.perf_counter()
    side(prompts, new)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
