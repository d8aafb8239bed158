"""Collectives by size on all devices of a node: a worker of torchrun's kind, ``… sweep OPTIONS.json``.

Rates are of the bus, as NCCL's tests define it: bytes that a rank must send, by seconds. So they can be compared with
the link, whatever the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lab_utils.ascend.workers import answer

REPEATS = 5
# Bytes that a rank must send, as a share of its buffer, by the number of ranks P.
SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda P: 2 * (P - 1) / P,
    "all_gather": lambda P: (P - 1) / P,
    "all_to_all": lambda P: (P - 1) / P,
}


def main(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``collective``, ``bytes`` (of the whole buffer), ``ms``, ``gb_s`` and ``right``: the values that came."""
    import torch
    import torch.distributed as dist

    from lab_utils.accelerators import get_accelerator
    from lab_utils.engine import colossal

    accelerator = get_accelerator(options["device"])
    device = accelerator.setup(*_place())
    rank, ranks = colossal.start(accelerator, 0)
    rows = []
    for size in options["bytes"]:
        count = max(size // 4 // ranks, 1) * ranks
        for name in SENT:
            run, check = _collective(name, count, rank, ranks, device)
            run()
            right = check()
            times = []
            for _ in range(REPEATS):
                accelerator.synchronize()
                dist.barrier()
                began = time.perf_counter()
                run()
                accelerator.synchronize()
                times.append(time.perf_counter() - began)
            slowest = torch.tensor([sorted(times)[REPEATS // 2], 0.0 if right else 1.0], device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            seconds, wrong = slowest.tolist()
            sent = SENT[name](ranks) * count * 4
            row = {"collective": name, "bytes": count * 4, "ms": seconds * 1e3, "right": not wrong}
            rows.append(row | {"gb_s": sent / seconds / 1e9})
    return rows


def _collective(name: str, count: int, rank: int, ranks: int, device: Any) -> tuple[Callable, Callable]:
    """The call, and whether what came of its first time is right."""
    import torch
    import torch.distributed as dist

    from lab_utils.collectives import all_gather

    part = count // ranks
    whole = torch.full((count,), float(rank), device=device)
    own, out = torch.full((part,), float(rank), device=device), torch.empty(count, device=device)
    by_rank = torch.arange(ranks, device=device, dtype=torch.float32).repeat_interleave(part)
    if name == "all_reduce":
        expected = torch.full_like(whole, ranks * (ranks - 1) / 2)
        return lambda: dist.all_reduce(whole), lambda: bool((whole == expected).all())
    if name == "all_gather":
        return lambda: all_gather(out, own), lambda: bool((out == by_rank).all())
    return lambda: dist.all_to_all_single(out, whole), lambda: bool((out == by_rank).all())


def _place() -> tuple[int, int | None, int]:
    import os

    return int(os.environ.get("LOCAL_RANK", 0)), None, int(os.environ.get("LOCAL_WORLD_SIZE", 1))


if __name__ == "__main__":
    answer(main)
