"""ZeRO-1 on flat fp32 gradient buffers: ColossalAI's optimizer with its sums, norm and step put right.

Imported by ``colossal.py`` after ColossalAI itself. How parameters are cut, and where the pieces lie, is
``placement.py``; here gradients are gathered, summed, measured, applied, and states go in and out by global name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from lab_utils import collectives
from lab_utils.engine.library import HybridParallelZeroOptimizer
from lab_utils.engine.placement import Bucket, Place, Sharding, fill_buckets
from lab_utils.engine.rows import Rows

# torch 2.13 renamed these two; 2.12 knows only the old names.


@dataclass(frozen=True)
class Groups:
    """Over which ranks gradients are summed, and over which of them masters and states are cut.

    Args:
        dense, experts, ends: of parameters that all data-parallel ranks of a stage hold, of those that a rank holds a
            share of, and of those that the first and the last stage both hold.
        whole_dense, whole_experts: the same for matrices that go whole to one rank: cut over so few ranks that each
            gets its share of elements, and repeated beyond them (TR §3.4.1: a limited ZeRO group).
        data: all ranks that see different tokens in the same stage.
        world: every rank; the gradient norm is summed over it.
    """

    dense: Sharding
    experts: Sharding
    ends: Sharding
    whole_dense: Sharding
    whole_experts: Sharding
    data: dist.ProcessGroup
    world: dist.ProcessGroup | None = None

    def of(self, tensor: Tensor, whole: bool = False) -> Sharding:
        """By the marks that the policy left on a tensor of the model; ``whole``: its matrices are not cut."""
        if whole:
            return self.whole_experts if hasattr(tensor, "ep_group") else self.whole_dense
        if hasattr(tensor, "ep_group"):
            return self.experts
        return self.ends if hasattr(tensor, "both_ends") else self.dense


PIECE = 1024  # numbers whose squares are added up at once


def norm_of(flat: Tensor) -> Tensor:
    """L2 norm of a flat fp32 buffer, piece by piece: a CPU adds up a long one in order, and after millions of numbers
    has lost several ten-thousandths of the sum."""
    while len(flat) > PIECE:
        whole = len(flat) - len(flat) % PIECE
        pieces = torch.linalg.vector_norm(flat[:whole].view(-1, PIECE), dim=1)
        flat = torch.cat([pieces, flat[whole:]])
    return torch.linalg.vector_norm(flat)


class ZeroOptimizer(HybridParallelZeroOptimizer):
    """ColossalAI's ZeRO optimizer with these defects answered.

    - Gradients are summed and accumulated over micro-batches in the working dtype (bf16): here in fp32, from a hook
      that takes each gradient as soon as it is made, so that no second full set of gradients exists.
    - Host work grows with parameters × ranks, one view and copy a slice: here one strided copy a piece.
    - ``low_level_optim.py`` averages over ranks, and experts over too few of them: here a sum, since the engine weights
      the loss by the global token count, and an expert has seen the tokens of its whole group.
    - The gradient norm adds the norms of dense and expert parameters, and differs from rank to rank: here
      ``gradient_norm`` squares each element once, the same number on every rank.
    - All parameters must share one dtype ("device is required" on CPU besides): here a bucket has one dtype, and an
      fp32 parameter of a bf16 model stays fp32.
    - A master copy is made of fp32 parameters too: here their master is a view of the parameter.
    - A parameter that gets a gradient on some ranks only makes ranks reduce different buckets and hang: here every
      bucket is reduced, and ranks agree on which parameters take part in the step.
    - Only flat slices reach the optimizer: here a matrix that Muon orthogonalises goes whole to one rank.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        param_info: dict[str, Any],
        names: dict[int, str],
        groups: Groups,
        bucket_elements: int,
        offload: bool = False,
    ) -> None:
        self._groups, self._names, self._bucket_elements = groups, names, bucket_elements
        self._offload = offload
        self._config = getattr(getattr(model, "module", model), "config", None)
        self.buckets: list[Bucket] = []
        super().__init__(
            optimizer,
            model,
            use_pipeline=False,
            param_info=param_info,
            dp_process_group=groups.data,
            overlap_communication=False,
            clip_grad_norm=0.0,
        )
        self.places = [place for bucket in self.buckets for place in bucket.places]
        for index, place in enumerate(self.places):
            place.index = index
        self._by_name = {place.name: place for place in self.places}
        self._touched: Tensor = torch.zeros(len(self.places), device=self.buckets[0].gradients.device)
        self._local_touched = [False] * len(self.places)
        self._hooks = [
            place.working.register_post_accumulate_grad_hook(self._collector(bucket, place))
            for bucket in self.buckets
            for place in bucket.places
        ]

    # -- construction -------------------------------------------------------------------------------------------------

    def _sanity_checks(self) -> None:
        """Answers "device is required" and the demand for one dtype."""

    def _create_master_param_current_rank(self, param_list: list[torch.nn.Parameter]) -> list[Tensor]:
        """The masters of one optimizer group: this rank's pieces of its parameters, in the order of the buckets."""
        group = next(g for g in self.optim.param_groups if g["params"] and g["params"][0] is param_list[0])
        whole = group.get("algorithm") == "muon"
        filled = fill_buckets(
            [(self._names[id(p)], p, self._groups.of(p, whole)) for p in param_list],
            whole_matrices=whole,
            bucket_elements=self._bucket_elements,
            config=self._config,
            offload=self._offload,
        )
        self.buckets += filled
        return [master for bucket in filled for place in bucket.places for master in place.masters]

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _collector(self, bucket: Bucket, place: Place):
        """A hook that adds a fresh gradient into the bucket in fp32 and lets go of it."""

        def collect(param: torch.nn.Parameter) -> None:
            place.add(bucket.gradients, param.grad.reshape(-1))
            param.grad = None
            self._local_touched[place.index] = True

        return collect

    def sync_dp_grads(self) -> None:
        """Defect: calls the sum of its parent by name, past an override; a pipeline ends its batch with this one."""
        self._sync_grad()

    def _sync_grad(self) -> None:
        """Sum every bucket over the ranks that share it, in fp32; called at the end of the last micro-batch."""
        for bucket in self.buckets:
            sharding = bucket.sharding
            if sharding.ranks == 1:
                continue
            if sharding.shards == sharding.ranks and dist.get_backend(sharding.reduce_group) != "gloo":
                own = torch.empty_like(bucket.gradients[0])
                collectives.reduce_scatter(own, bucket.gradients.view(-1), group=sharding.reduce_group)
                bucket.own_gradients.copy_(own)
            else:  # gloo reduces and scatters no faster than it reduces
                dist.all_reduce(bucket.gradients, group=sharding.reduce_group)

    def gradient_norm(self, bad: bool = False) -> float:
        """Global L2 norm of the summed gradient, each element once; NaN on every rank if ``bad`` on any.

        Small all-reduces, which also settle which parameters have a gradient on some rank.
        """
        device = self.buckets[0].gradients.device
        norms = [norm_of(bucket.own_gradients) for bucket in self.buckets]
        shares = [bucket.sharding.ranks / bucket.sharding.shards for bucket in self.buckets]
        squares = (torch.stack(norms).square() / torch.tensor(shares, device=device)).sum()
        verdict = torch.stack([squares, torch.tensor(float(bad), device=device)])
        dist.all_reduce(verdict, group=self._groups.world)
        # A parameter of both ends has a gradient in both, or in neither: the data group of one stage tells.
        touched = torch.tensor(self._local_touched, dtype=torch.float32, device=device)
        dist.all_reduce(touched, group=self._groups.data)
        self._touched = touched.cpu()
        total, any_bad = verdict.tolist()
        return float("nan") if any_bad else total**0.5

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of a step: also how a step with a non-finite one is dropped."""
        for bucket in self.buckets:
            bucket.gradients.zero_()
        for place in self.places:
            place.working.grad = None
        self._local_touched = [False] * len(self.places)

    # -- step ---------------------------------------------------------------------------------------------------------

    def step(self, scale: float = 1.0) -> None:
        """Update masters by the gradient times ``scale`` (the clipping factor), then the working parameters.

        ``gradient_norm`` must have been called after the last backward.
        """
        takes_part = self._touched.tolist()
        for bucket in self.buckets:
            if scale != 1.0:
                bucket.own_gradients.mul_(scale)
            for place in bucket.places:
                for master, gradient in zip(place.masters, place.own_columns(bucket.own_gradients)):
                    master.grad = gradient.to(master.device) if takes_part[place.index] else None
        self.optim.step()
        for place in self.places:
            for master in place.masters:
                master.grad = None
        self.refresh_working()

    @torch.no_grad()
    def refresh_working(self) -> None:
        """Write the masters of all ranks into the working parameters, rounded to their dtype."""
        for bucket in self.buckets:
            sources = [place.masters for place in bucket.places]
            if bucket.sharding.shards == 1 and bucket.dtype == torch.float32 and not self._offload:
                continue  # the masters are the parameters
            for place, rows in self._gathered(bucket, sources, bucket.dtype):
                place.fill(place.working.data.view(-1), rows)

    def _gathered(
        self, bucket: Bucket, sources: list[list[Tensor]], dtype: torch.dtype
    ) -> Iterator[tuple[Place, Tensor]]:
        """Each place with the rows ``[S, width]`` of all ranks, filled from every rank's pieces of one bucket."""
        own = bucket.gradients.new_zeros(bucket.width, dtype=dtype)
        for place, pieces in zip(bucket.places, sources, strict=True):
            for columns, source in zip(place.own_columns(own), pieces, strict=True):
                columns.copy_(source)
        if bucket.sharding.shards == 1:
            rows = own[None]
        else:
            rows = own.new_empty(bucket.sharding.shards, bucket.width)
            collectives.all_gather(rows.view(-1), own, group=bucket.sharding.shard_group)
        for place in bucket.places:
            yield place, rows

    # -- state by global name -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def named_state(self) -> Iterator[tuple[str, Rows, dict[str, Tensor]]]:
        """Master and optimizer state of each parameter by name, with the rows of it that this rank holds.

        Each comes from one rank, its owner; every rank must run through the iterator, since each bucket is gathered.
        Tensor states come in the shape of those rows, scalar ones (AdamW's ``step``) as they are; a parameter never
        stepped has its master only.
        """
        for bucket in self.buckets:
            sharding = bucket.sharding
            states = [[self.optim.state.get(m, {}) for m in place.masters] for place in bucket.places]
            sliced = {k for pieces in states for s in pieces for k, v in s.items() if _is_sliced(v)}
            scalars = [{k: v for s in pieces for k, v in s.items() if not _is_sliced(v)} for pieces in states]
            # A rank may hold no piece of a parameter, so what there is to gather is agreed on.
            known = _agreed([sorted(sliced), scalars], sharding)
            keys = sorted({key for part, _ in known for key in part})
            merged = [
                {k: v for _, part in known for k, v in part[i].items()} for i in range(len(bucket.places))
            ]
            stepped = _agreed([any(pieces) for pieces in states], sharding)
            found: list[dict[str, Tensor]] = [{} for _ in bucket.places]
            for key in ("master", *keys):
                sources = [
                    [m if key == "master" else s.get(key, torch.zeros_like(m)) for m, s in zip(p.masters, st)]
                    for p, st in zip(bucket.places, states, strict=True)
                ]
                for i, (place, rows) in enumerate(self._gathered(bucket, sources, torch.float32)):
                    owner = crc32(place.name.encode()) % sharding.ranks == sharding.rank
                    if owner and (key == "master" or any(part[i] for part in stepped)):
                        whole = rows.new_empty(place.working.numel())
                        place.fill(whole, rows)
                        found[i][key] = whole.view(place.shape)
            for place, tensors, scalar in zip(bucket.places, found, merged, strict=True):
                if tensors:
                    yield place.name, place.rows, tensors | scalar

    @torch.no_grad()
    def named_gradients(self) -> Iterator[tuple[str, Rows, Tensor]]:
        """Summed gradient of each parameter by name, with the rows of it that this rank holds; collective, as is
        ``named_state``. To be asked after the last backward pass of a step, before ``step``."""
        for bucket in self.buckets:
            sources = [place.own_columns(bucket.own_gradients) for place in bucket.places]
            for place, rows in self._gathered(bucket, sources, torch.float32):
                whole = rows.new_empty(place.working.numel())
                place.fill(whole, rows)
                yield place.name, place.rows, whole.view(place.shape)

    @property
    def places_by_name(self) -> dict[str, Place]:
        """Where each trained parameter of this rank lives."""
        return self._by_name

    @torch.no_grad()
    def load_named_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Take this rank's pieces of a parameter's state, given in the shape of the rows that this rank holds.

        ``refresh_working`` must follow the last one.
        """
        place = self._by_name[name]
        sliced = {key: place.own_of(value) for key, value in state.items() if value.ndim}
        for i, master in enumerate(place.masters):
            kept = {key: pieces[i].to(master.device, copy=True) for key, pieces in sliced.items()}
            master.copy_(kept.pop("master"))
            kept |= {key: value.clone() for key, value in state.items() if not value.ndim}
            if kept:
                self.optim.state[master] = kept


def _agreed(value: Any, sharding: Sharding) -> list[Any]:
    """One small Python value from each rank that holds pieces of the same parameters."""
    if sharding.shards == 1:
        return [value]
    found: list[Any] = [None] * sharding.shards
    dist.all_gather_object(found, value, group=sharding.shard_group)
    return found


def _is_sliced(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
