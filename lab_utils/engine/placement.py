"""Where the pieces of each parameter lie among the ranks that share its optimizer state.

A bucket is a run of parameters of one optimizer group, dtype and set of ranks. Its gradient buffer is ``[S, width]``: S
shards (ranks), row r what rank r owns. Reducing the buffer over the ranks leaves in row r the gradient of rank r's
masters. Two ways of cutting: AdamW's parameters into S flat slices; Muon's into matrices, each whole on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lab_utils.engine.rows import Rows
from lab_utils.optim.dealing import assign

# A bucket of whole matrices is closed when each rank's share of it is this many of its largest. A buffer is as wide as
# its fullest row, so with less in it, or with many small matrices and few large ones, most of it would be padding.
MATRICES_A_RANK = 4


@dataclass(frozen=True)
class Sharding:
    """The ranks over which a gradient is summed, and those among them over which its masters are cut."""

    reduce_group: dist.ProcessGroup
    shard_group: dist.ProcessGroup

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.reduce_group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.reduce_group)

    @property
    def shards(self) -> int:
        return dist.get_world_size(self.shard_group)

    @property
    def shard(self) -> int:
        return dist.get_rank(self.shard_group)


@dataclass(frozen=True)
class Piece:
    """A run of a flattened parameter's elements: ``count`` times ``length`` of them from ``start`` on, the i-th time in
    row ``row + i``, each in columns from ``column``. One strided copy whatever the number of ranks."""

    row: int
    column: int
    start: int
    length: int
    shape: tuple[int, ...]  # of a master
    count: int = 1

    def of(self, flat: Tensor) -> Tensor:
        """Its elements of the flattened parameter, ``[count, length]``."""
        return flat[self.start : self.start + self.count * self.length].view(self.count, self.length)

    def columns(self, rows_SW: Tensor) -> Tensor:
        """Its columns in the rows of all ranks, ``[count, length]``."""
        return rows_SW[self.row : self.row + self.count, self.column : self.column + self.length]


@dataclass
class Place:
    """One parameter: its pieces on all ranks, and this rank's masters, one for each piece that touches its row."""

    name: str
    working: torch.nn.Parameter
    sharding: Sharding
    pieces: list[Piece]
    masters: list[Tensor] = field(default_factory=list)
    index: int = -1

    def __post_init__(self) -> None:
        shard = self.sharding.shard
        self._own = [piece for piece in self.pieces if piece.row <= shard < piece.row + piece.count]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter and its states; never of zero dimensions, which tell a scalar state."""
        return tuple(self.working.shape) or (1,)

    @property
    def rows(self) -> Rows:
        return Rows.of(self.working)

    def make_masters(self, offload: bool) -> None:
        """Views of an fp32 parameter, fp32 copies of any other; ``offload``: copies in host memory of all."""
        own = self.own_of(self.working.data)
        if offload:
            self.masters = [piece.to("cpu", torch.float32, copy=True) for piece in own]
        else:
            self.masters = [piece if piece.dtype == torch.float32 else piece.float() for piece in own]

    def own_of(self, whole: Tensor) -> list[Tensor]:
        """Views of a tensor of the parameter's shape where this rank's masters stand, in their shapes."""
        flat, shard = whole.detach().reshape(-1), self.sharding.shard
        return [piece.of(flat)[shard - piece.row].view(piece.shape) for piece in self._own]

    def own_columns(self, row_W: Tensor) -> list[Tensor]:
        """Views of this rank's row of a bucket where its masters stand, in their shapes."""
        return [row_W[p.column : p.column + p.length].view(p.shape) for p in self._own]

    def add(self, rows_SW: Tensor, flat: Tensor) -> None:
        """Add a flattened gradient to its columns."""
        for piece in self.pieces:
            piece.columns(rows_SW).add_(piece.of(flat))

    def fill(self, flat: Tensor, rows_SW: Tensor) -> None:
        """Write the flattened parameter from its columns."""
        for piece in self.pieces:
            piece.of(flat).copy_(piece.columns(rows_SW))


@dataclass
class Bucket:
    places: list[Place]
    dtype: torch.dtype
    width: int
    sharding: Sharding
    gradients: Tensor  # [S, width] fp32

    @property
    def own_gradients(self) -> Tensor:
        return self.gradients[self.sharding.shard]


Wanted = tuple[str, torch.nn.Parameter, Sharding]


def fill_buckets(
    wanted: list[Wanted], *, whole_matrices: bool, bucket_elements: int, config: Any, offload: bool = False
) -> list[Bucket]:
    """Buckets for the parameters of one optimizer group, masters made.

    Args:
        wanted: global name, parameter, and the ranks that share it; in the model's order.
        whole_matrices: cut into the matrices of ``optim.groups.matrices`` instead of flat slices.
        bucket_elements: a bucket is closed when it holds so many.
        config: the model's configuration, for the shapes of its matrices.
        offload: masters, and with them the optimizer's state, in host memory.
    """
    kinds: dict[tuple, list[Wanted]] = {}
    for item in wanted:
        kinds.setdefault((item[1].dtype, item[2]), []).append(item)
    place = _whole_places if whole_matrices else _flat_places
    buckets = []
    for (dtype, sharding), items in kinds.items():
        for places, width in place(items, sharding, bucket_elements, config):
            device = places[0].working.device
            gradients = torch.zeros(sharding.shards, width, dtype=torch.float32, device=device)
            for one in places:
                one.make_masters(offload)
            buckets.append(Bucket(places, dtype, width, sharding, gradients))
    return buckets


def _flat_places(items: list[Wanted], sharding: Sharding, bucket_elements: int, config: Any):
    """Runs of parameters, each cut into S slices of one length (the last ones shorter or absent)."""
    places, width = [], 0
    for name, parameter, _ in items:
        size, S = parameter.numel(), sharding.shards
        own = -(-size // S)
        if places and (width + own) * S > bucket_elements:
            yield places, width
            places, width = [], 0
        whole, rest = divmod(size, own) if own else (0, 0)
        pieces = [Piece(0, width, 0, own, (own,), count=whole)] if whole else []
        pieces += [Piece(whole, width, whole * own, rest, (rest,))] if rest else []
        places.append(Place(name, parameter, sharding, pieces))
        width += own
    if places:
        yield places, width


def _whole_places(items: list[Wanted], sharding: Sharding, bucket_elements: int, config: Any):
    """Runs of parameters whose matrices are dealt out to the ranks by size."""
    from lab_utils.optim.groups import matrices

    loads = [0] * sharding.shards
    run: list[tuple[str, torch.nn.Parameter, list]] = []
    elements = largest = 0
    for name, parameter, _ in items:
        views = matrices(name, tuple(parameter.shape), config)
        assert views is not None, f"{name} is in a Muon group but has no matrices"
        run.append((name, parameter, views))
        elements += parameter.numel()
        largest = max(largest, *(view.size for view in views))
        if elements >= max(bucket_elements, MATRICES_A_RANK * sharding.shards * largest):
            yield _deal(run, sharding, loads)
            run, elements, largest = [], 0, 0
    if run:
        yield _deal(run, sharding, loads)


def _deal(run: list, sharding: Sharding, loads: list[int]) -> tuple[list[Place], int]:
    """Owners for the matrices of one bucket: the largest first, to the rank that has least by now.

    ``loads`` goes on from bucket to bucket, so that ranks are even over all of them.
    """
    sizes = [view.size for _, _, views in run for view in views]
    chosen = assign(sizes, sharding.shards, loads)
    for row, size in zip(chosen, sizes, strict=True):
        loads[row] += size
    owners = iter(chosen)
    filled = [0] * sharding.shards
    places = []
    for name, parameter, views in run:
        pieces = []
        for view in views:
            row, size = next(owners), view.size
            pieces.append(Piece(row, filled[row], view.start, size, (view.rows, view.cols)))
            filled[row] += size
        places.append(Place(name, parameter, sharding, pieces))
    return places, max(filled)
