"""Process groups of the real ``hccl`` backend, made as the engine makes them, up to the first byte sent.

The stand-in's HCCL makes communicators, writes down each call, and sends nothing: one process can be a rank of many.
"""

from __future__ import annotations

from collections.abc import Iterator

ORDER = 60
RANKS, CP, EP, PP = 16, 2, 4, 2
PROVES = {
    "groups": f"torch_npu makes every group of a layout over {RANKS} ranks with experts and stages on the hccl backend",
    "collectives": "each collective of the engine reaches HCCL in the group, with the count and dtype that were meant",
}
# HcclDataType of CANN's hccl_types.h.
FLOAT32, INT64, BFLOAT16 = 4, 5, 11


def run() -> Iterator[tuple[str, bool, str]]:
    import os
    import tempfile
    from pathlib import Path

    import torch
    import torch.distributed as dist
    import torch_npu  # noqa: F401

    from lab_utils.accelerators.npu import Npu
    from lab_utils.ascend import step
    from lab_utils.engine import colossal
    from lab_utils.engine.library import set_accelerator

    log = Path(tempfile.mkdtemp()) / "calls"
    os.environ["ASCENT_STAND_IN_LOG"] = str(log)
    device = Npu().setup()
    set_accelerator("npu")
    dist.init_process_group(Npu.backend, store=dist.HashStore(), rank=0, world_size=RANKS)
    changes = {"cluster.nproc": RANKS, "parallel.cp": CP, "parallel.ep": EP, "parallel.pp": PP}
    changes |= {"schedule.micro_rows": 1}
    layout = colossal.plugin(step.recipe(**changes).parallel, 1)
    data = RANKS // PP
    groups = {
        "world": (None, RANKS),
        "data": (layout.dp_group, data),
        "shared rows": (layout.parts.group, CP),
        "experts": (layout.ep_group, EP),
        "replicas of experts": (layout.moe_dp_group, data // EP),
        "stages": (layout.pp_group, PP),
    }
    wrong = [
        f"{name}: {dist.get_backend(group)} of {dist.get_world_size(group)}"
        for name, (group, size) in groups.items()
        if dist.get_backend(group) != "hccl" or dist.get_world_size(group) != size
    ]
    yield (
        "groups",
        not wrong,
        "; ".join(wrong) or ", ".join(f"{name} {size}" for name, (_, size) in groups.items()),
    )

    expected = _calls(layout, device)
    torch.npu.synchronize()
    found = read(log.read_text())
    missing = [call for call in expected if call not in found]
    said = f"{len(expected)} collectives, {sum(call[0] == 'HcclCommInit' for call in found)} communicators"
    yield "collectives", not missing, f"not seen: {missing[0]}; seen: {found}"[:500] if missing else said


def read(text: str) -> list[tuple[str, int, int, int, int]]:
    """Lines of the stand-in's log as (function, ranks, elements, dtype, operation or peer)."""
    rows = []
    for line in text.splitlines():
        name, _, ranks, _, *numbers = line.split()
        rows.append((name, int(ranks), *map(int, numbers)))
    return rows


def _calls(layout, device) -> list[tuple[str, int, int, int, int]]:
    """Every kind of collective that the engine uses, through the names that it uses; what HCCL must be asked."""
    import torch
    import torch.distributed as dist

    from lab_utils import collectives
    from lab_utils.models.deepseek_v4.expert_parallel import _AllToAll

    data = dist.get_world_size(layout.dp_group)
    whole, own = torch.empty(6 * data, device=device), torch.empty(6, device=device)
    dist.all_reduce(torch.empty(3, device=device))
    collectives.reduce_scatter(own, whole, group=layout.dp_group)
    collectives.all_gather(whole, own, group=layout.dp_group)
    counts = torch.empty(2 * EP, dtype=torch.int64, device=device)
    dist.all_to_all_single(torch.empty_like(counts), counts, group=layout.ep_group)
    rows = torch.empty(6, 5, dtype=torch.bfloat16, device=device)
    _AllToAll.apply(rows, [4, 3, 2, 1], [0, 1, 2, 3], layout.ep_group)
    tokens = torch.empty(1, 7, 5, dtype=torch.bfloat16, device=device)
    layout.parts.with_before(tokens, 3)
    streams = torch.empty(2, 3, 4, 8, dtype=torch.bfloat16, device=device)
    other = dist.get_process_group_ranks(layout.pp_group)[1]
    pair = [dist.P2POp(dist.isend, streams, other, layout.pp_group)]
    pair += [dist.P2POp(dist.irecv, torch.empty_like(streams), other, layout.pp_group)]
    for work in dist.batch_isend_irecv(pair):
        work.wait()
    return [
        ("HcclAllReduce", RANKS, 3, FLOAT32, 0),
        ("HcclReduceScatter", data, 6, FLOAT32, 0),
        ("HcclAllGather", data, 6, FLOAT32, 0),
        ("HcclAlltoAll", EP, 2 * EP, INT64, 0),
        ("HcclAlltoAllV", EP, 30, BFLOAT16, 0),
        ("HcclAlltoAllV", CP, 15, BFLOAT16, 0),
        ("HcclSend", PP, streams.numel(), BFLOAT16, 1),
        ("HcclRecv", PP, streams.numel(), BFLOAT16, 1),
    ]
