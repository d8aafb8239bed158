"""What a rank keeps from step to step: weights, fp32 gradients, masters, moments, as the engine's ZeRO cuts them.

The rules are those of ``engine/placement.py``: AdamW's parameters lie in flat slices over all ranks that share them,
Muon's matrices whole on one rank each, over so many ranks that each gets its share, and repeated beyond. They are
written here a second time since the engine's module needs torch; ``tests/planner`` compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from lab_utils.optim import dealing
from lab_utils.optim.dealing import assign
from lab_utils.optim.groups import matrices
from lab_utils.planner.numbers import (
    Numbers,
    Shape,
    embedding_shapes,
    final_shapes,
    layer_shapes,
    mtp_shapes,
    size,
)
from lab_utils.planner.placed import Placed, Stage

even_shards = cache(dealing.even_shards)  # of the same stages in a thousand layouts

BUCKET_ELEMENTS = 12 * 2**20  # of engine.colossal.plugin
MATRICES_A_RANK = 4  # of engine.placement
STACK_BYTES = 256 * 2**20  # of optim.muon
STEPS = 10  # of kernels/newton_schulz


@dataclass(frozen=True)
class State:
    """Elements of one rank of a stage.

    Attributes:
        parameters, dense, experts: of its weights.
        gradients: of its fp32 buffers, padding included.
        own_muon, own_adamw: of the masters that it holds and updates.
        bucket: of the largest buffer that one gather of new weights fills.
        stack: fp32 bytes of the largest stack of matrices that Muon works on, and ``gram`` of its squares.
        muon_flops: of Newton-Schulz on its matrices; ``muon_sizes``: shapes and how many of each.
        reduced: ``(elements, ranks, shards, experts)`` of the buffers by who sums them.
    """

    parameters: int
    dense: int
    experts: int
    gradients: int
    own_muon: int
    own_adamw: int
    bucket: int
    stack: int
    gram: int
    muon_flops: float
    reduced: tuple[tuple[int, int, int, bool], ...]


def state_of(placed: Placed, stage: int, *, muon: bool, zero: int, scored: bool = False) -> State:
    """What a rank of this stage keeps; of ranks that differ, the fullest."""
    where = placed.stages[stage]
    kinds = tuple(placed.numbers.kind(layer) for layer in where.layers)
    shards = _shards_of_matrices(placed, scored) if muon and zero else (1, 1)
    both_ends = placed.mtp and placed.pp > 1 and (where.first or where.last)
    held = _Held(placed.numbers, kinds, placed.ep, where.first, where.last, placed.mtp, scored)
    return _state(held, placed.data_ranks, placed.moe_dp, muon, bool(zero), shards, both_ends)


@dataclass(frozen=True)
class _Held:
    """Parameters of a stage, told by what stands in it; equal for stages that hold the same."""

    numbers: Numbers
    kinds: tuple[tuple[str, bool], ...]
    ep: int
    first: bool
    last: bool
    mtp: bool
    scored: bool

    def shapes(self) -> list[tuple[str, Shape]]:
        n, found = self.numbers, []
        if self.first or (self.last and self.mtp):
            found += embedding_shapes(n)
        for i, (kind, hashed) in enumerate(self.kinds):
            found += [(f"model.layers.{i}.{name}", s) for name, s in layer_shapes(n, kind, hashed, self.ep)]
        if self.last:
            found += final_shapes(n, self.scored)
            found += mtp_shapes(n, self.ep) if self.mtp else []
        return found


def _is_expert(name: str) -> bool:
    return ".mlp.experts." in name


@cache
def _views(name: str, shape: Shape, n: Numbers) -> tuple[tuple[int, int], ...] | None:
    found = matrices(name, shape, n)
    return None if found is None else tuple((view.rows, view.cols) for view in found)


def _matrices(name: str, shape: Shape, n: Numbers) -> tuple[tuple[int, int], ...] | None:
    # The rule reads the module's name and not the layer's number: one look-up serves all layers.
    return _views(".".join(p for p in name.split(".") if not p.isdigit()), shape, n)


@cache
def _stage_sizes(held: _Held) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of Muon's matrices in a stage, dense ones and experts'."""
    dense: list[int] = []
    experts: list[int] = []
    for name, shape in held.shapes():
        into = experts if _is_expert(name) else dense
        into += [rows * cols for rows, cols in _matrices(name, shape, held.numbers) or ()]
    return tuple(dense), tuple(experts)


def _shards_of_matrices(placed: Placed, scored: bool) -> tuple[int, int]:
    """Over how many ranks Muon's matrices are dealt out, the same in all stages."""
    data_ranks, moe_dp = placed.data_ranks, placed.moe_dp
    return _shards(placed.numbers, placed.stages, placed.ep, placed.mtp, scored, data_ranks, moe_dp)


@cache
def _shards(
    n: Numbers, stages: tuple[Stage, ...], ep: int, mtp: bool, scored: bool, dp: int, moe_dp: int
) -> tuple[int, int]:
    found = []
    for where in stages:
        kinds = tuple(n.kind(layer) for layer in where.layers)
        dense, experts = _stage_sizes(_Held(n, kinds, ep, where.first, where.last, mtp, scored))
        found.append((even_shards(dense, dp), even_shards(experts, moe_dp)))
    dense_counts, expert_counts = zip(*found, strict=True)
    return min(dense_counts), min(expert_counts)


@cache
def _state(
    held: _Held,
    dp: int,
    moe_dp: int,
    muon: bool,
    zero: bool,
    shards: tuple[int, int],
    both_ends: bool,
) -> State:
    shapes, n = held.shapes(), held.numbers
    flat: dict[tuple[int, bool, bool], list[int]] = {}
    whole: dict[bool, list[tuple[tuple[int, int], ...]]] = {}
    for name, shape in shapes:
        views, expert = _matrices(name, shape, n) if muon else None, _is_expert(name)
        if views:
            whole.setdefault(expert, []).append(views)
        else:
            ranks = moe_dp if expert else 2 * dp if both_ends and "embed_tokens" in name else dp
            flat.setdefault((ranks, expert, len(shape) >= 2), []).append(size(shape))
    gradients = own_adamw = bucket = 0
    reduced: dict[tuple[int, int, bool], int] = {}
    for (ranks, expert, _), sizes in flat.items():
        S = ranks if zero else 1
        widths = [-(-one // S) for one in sizes]
        total = S * sum(widths)
        gradients, own_adamw = gradients + total, own_adamw + sum(widths)
        bucket = max(bucket, max(S * w for w in widths), min(total, BUCKET_ELEMENTS))
        key = ranks, S, expert
        reduced[key] = reduced.get(key, 0) + total
    own_muon, flops, stack, gram = 0, 0.0, 0, 0
    for expert, parameters in whole.items():
        S, ranks = (shards[expert] if zero else 1), moe_dp if expert else dp
        dealt = _deal(tuple(parameters), S)
        gradients, own_muon = gradients + dealt.elements, own_muon + dealt.own
        flops += dealt.flops
        bucket = max(bucket, dealt.bucket)
        if dealt.stack > stack:
            stack, gram = dealt.stack, dealt.gram
        key = ranks, S, expert
        reduced[key] = reduced.get(key, 0) + dealt.elements
    experts = sum(size(shape) for name, shape in shapes if _is_expert(name))
    parameters_ = sum(size(shape) for _, shape in shapes)
    return State(
        parameters=parameters_,
        dense=parameters_ - experts,
        experts=experts,
        gradients=gradients,
        own_muon=own_muon,
        own_adamw=own_adamw,
        bucket=bucket,
        stack=stack,
        gram=gram,
        muon_flops=flops,
        reduced=tuple((elements, *key) for key, elements in reduced.items()),
    )


@dataclass(frozen=True)
class _Dealt:
    elements: int
    own: int
    bucket: int
    flops: float
    stack: int
    gram: int


@cache
def _deal(parameters: tuple[tuple[tuple[int, int], ...], ...], shards: int) -> _Dealt:
    """As ``engine.placement._whole_places``: buckets of whole matrices, dealt out by size.

    A buffer is as wide as its fullest row, and closed when a rank's share is several of its largest matrix.
    """
    loads, work = [0] * shards, [0.0] * shards
    elements = bucket = stack = gram = 0
    run: list[tuple[int, int]] = []
    inside = largest = 0

    def close() -> None:
        nonlocal elements, bucket, run, inside, largest
        if not run:
            return
        sizes = [rows * cols for rows, cols in run]
        filled = [0] * shards
        for owner, size_, (rows, cols) in zip(assign(sizes, shards, loads), sizes, run, strict=True):
            filled[owner] += size_
            work[owner] += newton_schulz_flops(rows, cols)
        for rank, added in enumerate(filled):
            loads[rank] += added
        elements += shards * max(filled)
        bucket = max(bucket, shards * max(filled))
        run, inside, largest = [], 0, 0

    for views in parameters:
        run += views
        inside += sum(rows * cols for rows, cols in views)
        largest = max(largest, *(rows * cols for rows, cols in views))
        if inside >= max(BUCKET_ELEMENTS, MATRICES_A_RANK * shards * largest):
            close()
    close()
    alike: dict[tuple[int, int], int] = {}
    for views in parameters:
        for shape in views:
            alike[shape] = alike.get(shape, 0) + 1
    for (rows, cols), count in alike.items():
        one = 4 * rows * cols
        together = min(-(-count // shards), max(1, STACK_BYTES // one))
        if one * together > stack:
            stack, gram = one * together, 2 * together * min(rows, cols) ** 2
    return _Dealt(elements, max(loads), bucket, max(work), stack, gram)


def newton_schulz_flops(rows: int, cols: int) -> float:
    """Of ``kernels/newton_schulz``: ten steps of X Xᵀ, its square, and their polynomial times X."""
    short, long = min(rows, cols), max(rows, cols)
    return STEPS * (4.0 * short * short * long + 2.0 * short**3)
