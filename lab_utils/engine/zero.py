"""ZeRO-1 on flat fp32 gradient buffers: ColossalAI's optimizer with its sums, norm and step put right.

Imported by ``colossal.py`` after ColossalAI itself. A bucket is a run of parameters of one group and dtype. Its
gradient buffer is ``[S, n]``: S shards (ranks), n elements a shard; row r holds shard r of every parameter, each padded
to a multiple of S. Reducing the buffer over the ranks leaves in row r the gradient of rank r's master slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelZeroOptimizer
from torch import Tensor

# torch 2.13 renamed these two; 2.12 knows only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Place:
    """Where a parameter lives in its bucket: columns ``[start, start + width)`` of every row."""

    name: str
    index: int
    working: torch.nn.Parameter
    master: Tensor
    group: int
    start: int
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter and its states; never of zero dimensions, which tell a scalar state."""
        return tuple(self.working.shape) or (1,)


@dataclass
class Bucket:
    places: list[Place]
    dtype: torch.dtype
    width: int
    gradients: Tensor  # [S, width] fp32


class ZeroOptimizer(HybridParallelZeroOptimizer):
    """ColossalAI's ZeRO optimizer with these defects answered.

    - Gradients are summed and accumulated over micro-batches in the working dtype (bf16): here in fp32, from a hook
      that takes each gradient as soon as it is made, so that no second full set of gradients exists.
    - Host work grows with parameters × ranks, one view and copy a slice: here one strided copy a parameter.
    - ``low_level_optim.py`` averages over ranks; the engine weights the loss by the global token count: here a sum.
    - The gradient norm is computed after the step has begun and differs from rank to rank with experts: here
      ``gradient_norm`` comes first, from each element once, the same number on every rank.
    - All parameters must share one dtype ("device is required" on CPU besides): here a bucket has one dtype, and an
      fp32 parameter of a bf16 model stays fp32.
    - A master copy is made of fp32 parameters too: here their master is a view of the parameter.
    - A parameter that gets a gradient on some ranks only makes ranks reduce different buckets and hang: here every
      bucket is reduced, and ranks agree on which parameters take part in the step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        param_info: dict[str, Any],
        names: dict[int, str],
        shard_group: dist.ProcessGroup,
        dp_group: dist.ProcessGroup,
        bucket_elements: int,
    ) -> None:
        super().__init__(
            optimizer,
            model,
            use_pipeline=False,
            param_info=param_info,
            dp_process_group=shard_group,
            overlap_communication=False,
            clip_grad_norm=0.0,
        )
        self.shard_group, self.dp_group = shard_group, dp_group
        self.shards, self.shard = dist.get_world_size(shard_group), dist.get_rank(shard_group)
        self.dp = dist.get_world_size(dp_group)
        self.buckets: list[Bucket] = []
        self._fill_buckets(names, bucket_elements)
        self.places = [place for bucket in self.buckets for place in bucket.places]
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
        shards, shard = dist.get_world_size(self._dp_of(param_list)), dist.get_rank(self._dp_of(param_list))
        masters = []
        for param in param_list:
            padding = -param.numel() % shards
            self.record_param_padding_size(param, padding)
            padded = param.data.reshape(-1)
            if padding:
                padded = torch.nn.functional.pad(padded, (0, padding))
            param.data = padded[: param.numel()].view(param.shape)
            self._working_param_to_padded_working_param[param] = padded
            own = padded.view(shards, -1)[shard].detach()
            master = own if own.dtype == torch.float32 else own.float()
            self.link_master_and_working_param(master, param)
            masters.append(master)
        return masters

    def _dp_of(self, param_list: list[torch.nn.Parameter]) -> dist.ProcessGroup:
        return self.param_to_pg[param_list[0]]

    def _fill_buckets(self, names: dict[int, str], bucket_elements: int) -> None:
        places: list[Place] = []
        key, width, index = None, 0, 0

        def close() -> None:
            if places:
                buffer = torch.zeros(self.shards, width, dtype=torch.float32, device=places[0].working.device)
                self.buckets.append(Bucket(list(places), places[0].working.dtype, width, buffer))
                places.clear()

        for group, params in self._working_param_groups.items():
            for param in params:
                own = -(-param.numel() // self.shards)
                if key != (group, param.dtype) or (width + own) * self.shards > bucket_elements:
                    close()
                    key, width = (group, param.dtype), 0
                master = self.working_to_master_param[id(param)]
                places.append(Place(names[id(param)], index, param, master, group, width, own))
                width, index = width + own, index + 1
        close()

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _collector(self, bucket: Bucket, place: Place):
        """A hook that adds a fresh gradient into the bucket in fp32 and lets go of it."""
        whole, rest = divmod(place.working.numel(), place.width)
        stop = place.start + place.width

        def collect(param: torch.nn.Parameter) -> None:
            flat = param.grad.reshape(-1)
            bucket.gradients[:whole, place.start : stop].add_(
                flat[: whole * place.width].view(whole, place.width)
            )
            if rest:
                bucket.gradients[whole, place.start : place.start + rest].add_(flat[whole * place.width :])
            param.grad = None
            self._local_touched[place.index] = True

        return collect

    def _sync_grad(self) -> None:
        """Sum every bucket over the data-parallel ranks, in fp32; called at the end of the last micro-batch."""
        if self.dp == 1:
            return
        for bucket in self.buckets:
            if self.shards == self.dp and dist.get_backend(self.dp_group) != "gloo":
                own = torch.empty_like(bucket.gradients[0])
                _reduce_scatter(own, bucket.gradients.view(-1), group=self.dp_group)
                bucket.gradients[self.shard].copy_(own)
            else:  # gloo reduces and scatters no faster than it reduces
                dist.all_reduce(bucket.gradients, group=self.dp_group)

    def gradient_norm(self, bad: bool = False) -> float:
        """Global L2 norm of the summed gradient, each element once; NaN on every rank if ``bad`` on any.

        One small all-reduce, which also settles which parameters have a gradient on some rank.
        """
        device = self._touched.device
        rows = [bucket.gradients[self.shard] for bucket in self.buckets]
        squares = torch.stack(torch._foreach_norm(rows)).square().sum() / (self.dp // self.shards)
        touched = torch.tensor(self._local_touched, dtype=torch.float32, device=device)
        verdict = torch.cat([squares.view(1), torch.tensor([float(bad)], device=device), touched])
        dist.all_reduce(verdict, group=self.dp_group)
        self._touched = verdict[2:].cpu()
        total, any_bad = verdict[:2].tolist()
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
            row = bucket.gradients[self.shard]
            if scale != 1.0:
                row.mul_(scale)
            for place in bucket.places:
                place.master.grad = (
                    row[place.start : place.start + place.width] if takes_part[place.index] else None
                )
        self.optim.step()
        for place in self.places:
            place.master.grad = None
        self.refresh_working()

    @torch.no_grad()
    def refresh_working(self) -> None:
        """Write the masters of all ranks into the working parameters, rounded to their dtype."""
        for bucket in self.buckets:
            for place, whole in self._gathered(bucket, [p.master for p in bucket.places], bucket.dtype):
                if whole.data_ptr() != place.working.data_ptr():
                    place.working.copy_(whole.view(place.working.shape))

    def _gathered(
        self, bucket: Bucket, slices: list[Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[Place, Tensor]]:
        """Whole tensors, in the shape of the parameters, from every rank's slices of one bucket."""
        if self.shards == 1:
            for place, own in zip(bucket.places, slices, strict=True):
                yield place, own.to(dtype)[: place.working.numel()].view(place.shape)
            return
        own = torch.cat(slices).to(dtype)
        rows = torch.empty(self.shards, bucket.width, dtype=dtype, device=own.device)
        _all_gather(rows.view(-1), own, group=self.shard_group)
        for place in bucket.places:
            columns = rows[:, place.start : place.start + place.width]
            yield place, columns.reshape(-1)[: place.working.numel()].view(place.shape)

    # -- state by global name -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def named_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Master and optimizer state of each parameter, whole, by name: each on one rank, its owner.

        Every rank must run through the iterator, since each bucket is gathered. Tensor states come in the parameter's
        shape, scalar ones (AdamW's ``step``) as they are; a parameter never stepped has its master only.
        """
        rank = dist.get_rank(self.dp_group)
        for bucket in self.buckets:
            states = [self.optim.state.get(place.master, {}) for place in bucket.places]
            keys = sorted({key for state in states for key, value in state.items() if _is_sliced(value)})
            mine = [place.index % self.dp == rank for place in bucket.places]
            found: list[dict[str, Tensor]] = [{} for _ in bucket.places]
            for key in ("master", *keys):
                slices = [
                    place.master if key == "master" else state.get(key, torch.zeros_like(place.master))
                    for place, state in zip(bucket.places, states, strict=True)
                ]
                for i, (_, whole) in enumerate(self._gathered(bucket, slices, torch.float32)):
                    if mine[i] and (key == "master" or states[i]):
                        found[i][key] = whole
            for place, state, own, tensors in zip(bucket.places, states, mine, found, strict=True):
                if own:
                    yield place.name, tensors | {k: v for k, v in state.items() if not _is_sliced(v)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each trained parameter's state, by name."""
        return {place.name: place.shape for place in self.places}

    @torch.no_grad()
    def load_named_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Take this rank's slices of what ``named_state`` gave for a parameter, at any number of ranks.

        ``refresh_working`` must follow the last one.
        """
        place = self._by_name[name]
        kept = {}
        for key, value in state.items():
            if value.ndim == 0:
                kept[key] = value.clone()
                continue
            padded = torch.nn.functional.pad(
                value.reshape(-1), (0, place.width * self.shards - value.numel())
            )
            kept[key] = padded.view(self.shards, place.width)[self.shard].to(place.master.device, copy=True)
        place.master.copy_(kept.pop("master"))
        if kept:
            self.optim.state[place.master] = kept


def _is_sliced(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
