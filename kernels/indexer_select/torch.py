"""Indexer selection in query blocks: scores of one chunk at a time, never ``[T, C]``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import break_ties, full_dtype, working_dtype
from kernels.geometry import BlockPlan, Chunk, Geometry

BLOCK = 64  # queries that share one range of entries


def chunk_keys(plan: BlockPlan, chunk: Chunk, keys_BCK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row-local slots ``[G, L]``, rows of the flat keys ``[G, L]`` and the keys ``[G, L, K]`` of a chunk's ranges."""
    slots_GL, C = plan.entry_slots(chunk), keys_BCK.shape[1]
    row_G = torch.arange(chunk.row_0, chunk.row_1, device=slots_GL.device)
    flat_GL = row_G.repeat_interleave(chunk.block_1 - chunk.block_0)[:, None] * C + slots_GL.clamp(max=C - 1)
    keys_GLK = keys_BCK.reshape(-1, keys_BCK.shape[-1]).index_select(0, flat_GL.view(-1))
    return slots_GL, flat_GL, keys_GLK.view(*flat_GL.shape, -1)


def chunk_scores(q_GWHK: Tensor, keys_GLK: Tensor, weights_GWH: Tensor) -> tuple[Tensor, Tensor]:
    """``relu(q·k)`` as ``[G·W, H, L]`` and its weighted sum over heads ``[G, W, L]``, in at least fp32."""
    G, W, H, K = q_GWHK.shape
    dots = torch.bmm(q_GWHK.view(G, W * H, K), keys_GLK.transpose(1, 2)).relu_()
    dots = dots.to(full_dtype(dots)).view(G * W, H, -1)
    return dots, torch.bmm(weights_GWH.reshape(G * W, 1, H).to(dots.dtype), dots).view(G, W, -1)


@torch.no_grad()
def indexer_select(
    q_BTHK: Tensor, keys_BCK: Tensor, weights_BTH: Tensor, geometry: Geometry, *, rate: int, topk: int
) -> Tensor:
    """See ``reference.indexer_select``."""
    S, work = min(topk, keys_BCK.shape[1]), working_dtype(q_BTHK)
    selected_BTS = q_BTHK.new_full((*q_BTHK.shape[:2], S), -1, dtype=torch.long)
    plan = geometry.plan(BLOCK, 0, rate, q_BTHK.shape[2])
    for chunk in plan.chunks:
        if not chunk.entries:
            continue
        slots_GL, _, keys_GLK = chunk_keys(plan, chunk, keys_BCK.to(work))
        q_GWHK = plan.take(q_BTHK, chunk).to(work)
        _, scores_GWL = chunk_scores(q_GWHK, keys_GLK, plan.take(weights_BTH, chunk))
        scores_GWL = break_ties(scores_GWL).masked_fill_(~plan.entry_seen(chunk, slots_GL), float("-inf"))
        values, index = scores_GWL.topk(min(S, chunk.entries), -1, sorted=False)
        index = _retake_ties(scores_GWL, values, index, plan, chunk, slots_GL[:, :1])
        found = torch.where(values == float("-inf"), -1, index + slots_GL[:, :1, None])
        if found.shape[-1] < S:
            found = torch.nn.functional.pad(found, (0, S - found.shape[-1]), value=-1)
        plan.put(selected_BTS, chunk, found)
    return selected_BTS


def _retake_ties(
    scores_GWL: Tensor, values_GWS: Tensor, index_GWS: Tensor, plan: BlockPlan, chunk: Chunk, low_G1: Tensor
) -> Tensor:
    """The selection, with the choice among equal scores made as for the document alone.

    Entries that no head likes all score zero, and which of them a top-k keeps depends on what else is in the row:
    packing would change the result. A query with such a choice gets its top-k over exactly its document's entries.
    """
    worst_GW1 = values_GWS.amin(-1, keepdim=True)
    candidates_GW = (scores_GWL >= worst_GW1).sum(-1)
    tied_GW = (candidates_GW > values_GWS.shape[-1]) & (worst_GW1[..., 0] > float("-inf"))
    if not tied_GW.any():
        return index_GWS
    entries = plan.entries
    offset_R = (plan.take(entries.first_BT, chunk) - low_G1)[tied_GW]
    count_R = plan.take(plan.geometry.length_BT // entries.rate, chunk)[tied_GW]
    scores_RL, retaken_RS = scores_GWL[tied_GW], index_GWS[tied_GW]
    scores_RL = torch.nn.functional.pad(scores_RL, (0, 1), value=float("-inf"))
    for count in count_R.unique().tolist():
        rows = count_R == count
        column = offset_R[rows, None] + torch.arange(count, device=offset_R.device)
        own = scores_RL[rows].gather(1, column.clamp(max=chunk.entries))
        retaken_RS[rows] = own.topk(retaken_RS.shape[1], -1).indices + offset_R[rows, None]
    index_GWS[tied_GW] = retaken_RS
    return index_GWS
