"""Metrics over ranks, and the small agreements that ranks make between steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lab_utils.telemetry.reductions import Metric, flatten, schema_of, unflatten

SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX


def over_ranks(metrics: dict[str, Metric], device: torch.device) -> dict[str, Metric]:
    """The same metrics reduced over all ranks by their types; a rank may lack some of the names.

    Two all-reduces whatever the number of metrics, after the names are agreed on.
    """
    schema = sorted({pair for part in gather_objects(schema_of(metrics)) for pair in part})
    flat = flatten(metrics, tuple(schema))
    return unflatten(flat.schema, all_reduce(flat.sums, device, SUM), all_reduce(flat.maxes, device, MAX))


def all_reduce(values: list[float], device: torch.device, op: Any = SUM) -> list[float]:
    """Numbers reduced over all ranks in one collective; float64 where the device has it."""
    if not values or dist.get_world_size() == 1:
        return list(values)
    packed = torch.tensor(
        values, device=device, dtype=torch.float32 if device.type == "npu" else torch.float64
    )
    dist.all_reduce(packed, op=op)
    return packed.tolist()


def gather_objects(value: Any) -> list[Any]:
    """One small Python value from each rank, by rank; without a process group, the caller's alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_first_stage(value: Any, layout: Any) -> Any:
    """A Python value of a pipeline's first stage, on all of its stages; the others' own is not looked at."""
    if layout.pp_size == 1:
        return value
    found = [value if layout.first_stage else None]
    dist.broadcast_object_list(found, dist.get_global_rank(layout.pp_group, 0), group=layout.pp_group)
    return found[0]
