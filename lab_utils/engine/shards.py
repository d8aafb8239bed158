"""What the ranks of a layout hold, through the real plugin and policy, without memory and without the ranks.

A process group of torch's "fake" backend stands in for thousands of ranks, and the model is on the meta device: for
one rank of every stage it is cut exactly as in a job. ``python -m lab_utils.engine.shards OPTIONS`` prints it as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch.distributed as dist

from lab_utils.engine import colossal
from lab_utils.models.deepseek_v4.expert_parallel import shard_experts
from lab_utils.models.deepseek_v4.materialise import without_memory
from lab_utils.models.load import load_config
from lab_utils.recipe import ParallelSection


def stages_of(source: str, ranks: int, parallel: ParallelSection, mtp: bool) -> list[dict[str, Any]]:
    """One row for each pipeline stage: ``stage``, ``layers`` (ranges of its virtual stages), ``dense`` and ``experts``
    (parameters of one rank), ``all_experts`` (of all ranks of an ep group), ``counted_elsewhere`` (of parameters that
    the first stage holds too), ``mtp`` (of this stage's own, those of multi-token prediction, over an ep group).
    """
    config = load_config(source)
    return [_stage(config, ranks, parallel, mtp, stage) for stage in range(parallel.pp)]


def _stage(config: Any, ranks: int, parallel: ParallelSection, mtp: bool, stage: int) -> dict[str, Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # The first replica's rank of this stage: the mesh is (moe_dp, pp, ep, …) from the outermost on.
    dist.init_process_group("fake", store=FakeStore(), rank=stage * parallel.ep, world_size=ranks)
    try:
        layout = colossal.plugin(parallel, micro_rows=1)
        model = without_memory(config, mtp_loss=1.0 if mtp else 0.0)
        layout.cut(model)
        named = list(model.named_parameters())
        experts = [(n, p) for n, p in named if hasattr(p, "ep_group")]
        spread = [(n, sum(_share(p, rank, parallel.ep) for rank in range(parallel.ep))) for n, p in experts]
        ids = {id(p) for _, p in experts}
        dense = [(n, p.numel()) for n, p in named if id(p) not in ids]
        first = layout.first_stage
        twice = sum(p.numel() for _, p in named if hasattr(p, "both_ends") and not first)
        return {
            "stage": stage,
            "layers": getattr(model, "stage", None) and model.stage.ranges,
            "dense": sum(size for _, size in dense),
            "experts": sum(p.numel() for _, p in experts),
            "all_experts": sum(size for _, size in spread),
            "counted_elsewhere": twice,
            "mtp": sum(size for name, size in [*dense, *spread] if name.startswith("mtp.")),
        }
    finally:
        dist.destroy_process_group()


def _share(parameter: Any, rank: int, ranks: int) -> int:
    """Elements of a stacked parameter that a rank of the ep group holds."""
    whole = parameter.new_empty(parameter.rows[1], *parameter.shape[1:])
    start, stop = shard_experts(whole, rank, ranks)
    return (stop - start) * parameter[0].numel()


def total(stages: list[dict[str, Any]]) -> int:
    """Parameters of the model: everything that a rank holds, once."""
    return sum(row["dense"] + row["all_experts"] - row["counted_elsewhere"] for row in stages)


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    rows = stages_of(
        options["source"], options["ranks"], ParallelSection(**options["parallel"]), options["mtp"]
    )
    print(json.dumps({"stages": rows, "parameters": total(rows), "mtp": sum(row["mtp"] for row in rows)}))
