"""Bytes that this rank sends, counted at torch.distributed's door while a block runs.

Counted as the usual algorithms send them: a ring all-reduce of n bytes over R ranks sends 2·n·(R-1)/R, an all-gather
(R-1) times its own share, a reduce-scatter n·(R-1)/R, an all-to-all what goes to others, a message its size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lab_utils import collectives


@contextmanager
def counted() -> Iterator[Counter]:
    """Bytes sent by kind of collective, filled in while the block runs."""
    sent: Counter = Counter()
    patches = [
        (dist, "all_reduce", lambda t, *a, group=None, **k: 2 * t.nbytes * _others(group)),
        (dist, "all_to_all_single", _to_others),
        (collectives, "all_gather", lambda out, own, group=None: own.nbytes * (_ranks(group) - 1)),
        (collectives, "reduce_scatter", lambda own, whole, group=None: whole.nbytes * _others(group)),
        (dist, "batch_isend_irecv", lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for (owner, name, measure), (_, _, function) in zip(patches, before, strict=True):
        setattr(owner, name, _counting(function, name.strip("_"), measure, sent))
    try:
        yield sent
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _counting(function: Any, kind: str, measure: Any, sent: Counter) -> Any:
    def counting(*args: Any, **kwargs: Any) -> Any:
        sent[kind] += int(measure(*args, **{k: v for k, v in kwargs.items() if k != "op"}))
        return function(*args, **kwargs)

    return counting


def _ranks(group: Any) -> int:
    return dist.get_world_size(group)


def _others(group: Any) -> float:
    return (_ranks(group) - 1) / _ranks(group)


def _to_others(
    out: Tensor,
    own: Tensor,
    received: Any = None,
    sizes: list[int] | None = None,
    group: Any = None,
    **kwargs: Any,
) -> float:
    if sizes is None:
        return own.nbytes * _others(group)
    rows = sum(sizes) - sizes[dist.get_rank(group)]
    return rows * own.nbytes / max(len(own), 1)
