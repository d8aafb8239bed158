"""``lab bench step``: one training step of ours and of transformers' eager DeepSeek-V4, in turn, on the same weights.

Each measurement has a process of its own, so that peak memory is that of one implementation, under the same allocator
settings, the same thread count and the same memory limit. The yardstick is the measured matrix-product peak.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPES = ((8, 256), (2, 1024), (1, 2048), (1, 4096), (1, 8192))

# glibc as it comes, or told to keep freed memory instead of handing it back and faulting it in again.
ALLOCATORS = {
    "system": {},
    "kept": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
}


def bench_step(
    preset: str = "reference",
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    *,
    limit_gib: float = 16.0,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    peer: bool = True,
    rounds: int = 1,
    allocator: str = "system",
    on_row: Callable[[dict], None] | None = None,
) -> list[dict[str, Any]]:
    """Training tokens/s and peak memory over rows × T.

    Args:
        preset: a preset of lab_utils/models/presets.py; weights are random and the same for both.
        shapes: (rows, tokens a row); every row is one document.
        limit_gib: memory that each process may use; a peer that needs more is reported as out of memory.
        threads: CPU threads; absent: all cores.
        device: ``cpu`` or ``cuda``.
        dtype: working precision of both.
        peer: measure transformers too.
        rounds: how often the two are measured in turn; speeds are medians over the rounds, memory the maximum.
        allocator: one of ``ALLOCATORS``, for both.
        on_row: called with each finished row, for progress.

    Returns:
        Rows of ``B``, ``T``, ``ours_tokens_per_s``, ``peer_tokens_per_s``, ``ratio``, ``ours_peak_mib``,
        ``peer_peak_mib``, ``fraction_of_peak``, ``peak_flops``; None where the peer ran out of memory.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "preset": preset,
            "weights": str(Path(folder) / "weights"),
            "limit_gib": limit_gib,
            "threads": threads or os.cpu_count(),
            "device": device,
            "dtype": dtype,
            "allocator": allocator,
        }
        peak = _child({**settings, "what": "peak"})["peak_flops"]
        _child({**settings, "what": "weights"})
        for B, T in shapes:
            sides = ("ours", "peer") if peer else ("ours",)
            found = [
                _child({**settings, "what": side, "B": B, "T": T}) for _ in range(rounds) for side in sides
            ]
            ours, theirs = _merged(found[:: len(sides)]), _merged(found[1::2]) if peer else {}
            speed, other = ours.get("tokens_per_s"), theirs.get("tokens_per_s")
            rows.append(
                {
                    "B": B,
                    "T": T,
                    "ours_tokens_per_s": speed,
                    "peer_tokens_per_s": other,
                    "ratio": speed / other if speed and other else None,
                    "ours_peak_mib": ours.get("peak_mib"),
                    "peer_peak_mib": theirs.get("peak_mib"),
                    "fraction_of_peak": speed * ours["flops_per_token"] / peak if speed else None,
                    "peer_fraction_of_peak": other * ours["flops_per_token"] / peak if other else None,
                    "loss_difference": abs(ours["loss"] - theirs["loss"]) if speed and other else None,
                    "peak_flops": peak,
                }
            )
            if on_row:
                on_row(rows[-1])
    return rows


def _merged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Several measurements of one side as one; out of memory once is out of memory."""
    if any("out_of_memory" in one for one in found):
        return {"out_of_memory": True}
    speed = statistics.median(one["tokens_per_s"] for one in found)
    return {**found[0], "tokens_per_s": speed, "peak_mib": max(one["peak_mib"] for one in found)}


def _child(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure in a fresh interpreter; out of memory is an answer, any other failure an error."""
    done = subprocess.run(
        [sys.executable, "-m", "lab_utils.bench.step", json.dumps(settings)],
        capture_output=True,
        text=True,
        env={**os.environ, **ALLOCATORS[settings["allocator"]]},
    )
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    tail = (done.stderr.strip().splitlines() or ["killed"])[-1]
    if done.returncode == -9 or "memory" in tail.lower():
        return {"out_of_memory": True}
    raise RuntimeError(f"bench step {settings['what']}: {tail}")


# -- the measuring process ---------------------------------------------------------------------------------------


def _measure(settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    if settings["device"] == "cpu":
        import resource

        limit = int(settings["limit_gib"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if settings["what"] == "peak":
        from lab_utils.accelerators import get_accelerator

        return {"peak_flops": get_accelerator(settings["device"]).peak(settings["dtype"]).flops}
    if settings["what"] == "weights":
        from lab_utils.models.load import load_model, save_pretrained

        model = load_model(f"preset:{settings['preset']}", dtype=torch.float32, seed=0)
        save_pretrained(model.state_dict(), model.config, Path(settings["weights"]))
        return {}
    dtype, device = getattr(torch, settings["dtype"]), torch.device(settings["device"])
    build = _ours if settings["what"] == "ours" else _peer
    return _time_steps(settings, *build(settings, dtype, device), device)


def _ours(settings: dict[str, Any], dtype: Any, device: Any) -> tuple[Any, Callable]:
    import torch

    from lab_utils.data.rows import PackedRows
    from lab_utils.models.load import load_model
    from lab_utils.objectives.sft import Sft

    # The peer has no indexer loss, so ours leaves it out here: the same work on both sides.
    model = load_model(settings["weights"], dtype=dtype, device=device, indexer_loss=0.0)
    objective = Sft()

    def loss_of(ids_BT: Any) -> Any:
        B, T = ids_BT.shape
        weights_BT = torch.ones(B, T, device=device)
        weights_BT[:, 0] = 0
        rows = PackedRows(
            input_ids=ids_BT,
            position_ids=torch.arange(T, device=device).expand(B, T),
            document_ids=torch.zeros_like(ids_BT),
            loss_weights=weights_BT,
        )
        output = model(rows.input_ids, rows.position_ids, rows.document_ids)
        loss = objective(output.hidden_BTD, model.head_weight, rows).loss
        return loss.total / loss.count

    return model, loss_of


def _peer(settings: dict[str, Any], dtype: Any, device: Any) -> tuple[Any, Callable]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        settings["weights"], dtype=dtype, attn_implementation="eager"
    )
    model = model.to(device).train()
    return model, lambda ids_BT: model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss


def _time_steps(settings: dict[str, Any], model: Any, loss_of: Callable, device: Any) -> dict[str, Any]:
    import resource
    import time

    import torch

    B, T = settings["B"], settings["T"]
    # The fused AdamW for both: the engine's, and the default of transformers' Trainer.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    batches = _batches(B, T, model.config.vocab_size, device)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(next(batches))
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()  # allocates the optimizer's state and warms the allocator up
    times: list[float] = []
    # At least two timed steps, more while they are quick: the median of a few seconds' worth.
    while len(times) < 2 or (sum(times) < 6 and len(times) < 10):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak_mib = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    flops = model.flops_per_token([T]) if hasattr(model, "flops_per_token") else None
    return {
        "tokens_per_s": B * T / sorted(times)[len(times) // 2],
        "peak_mib": peak_mib,
        "loss": first,
        "flops_per_token": flops,
    }


def _batches(B: int, T: int, vocabulary: int, device: Any) -> Iterator[Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(0, vocabulary, (B, T), generator=generator).to(device)


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
