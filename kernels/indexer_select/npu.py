"""Indexer selection by ``npu_lightning_indexer``, which knows nothing of compression: its causal mask is made to fit.

A query at position p of its document sees (p+1) div m entries. The queries of one document with the same remainder p
mod m, in order, see one more entry each: a right-aligned causal mask, which is the operator's, over as many entries as
make the last one fit. So it gets the documents m times, in TND layout: queries by (document, remainder), and each such
group its document's entries. Copies of entries are small beside the queries: one head of 128 channels for a quarter of
the tokens, m times.

Of equal scores the operator keeps what it likes. That matters where they are zero (no head likes an entry): the
definition takes the earliest. The rare row in which a choice among zeros is made is found by the scores that the
operator returns, and such a call is made again by ``torch.py``.

Limits (op-plugin's document): bf16 or fp16, at most 64 heads of 128 channels, S up to 2048 or 3072 … 8192 in steps of
1024. Legend as in ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu
from kernels.geometry import Geometry
from kernels.indexer_select.torch import indexer_select as by_torch

OPERATORS = ("npu::npu_lightning_indexer",)
unsupported = _npu.runs(OPERATORS, _npu.HALVES)
COUNTS = (*range(1, 2049), *range(3072, 8193, 1024))


class Groups:
    """Queries by (document, remainder) and the entries each group compares: rows of the flat tensors and their ends."""

    def __init__(self, geometry: Geometry, rate: int):
        entries, T, whole = geometry.entries(rate), geometry.T, geometry.whole
        steps, queries, keys, ends = torch.arange(max(whole.T, 1)), [], [], []
        seen = dict.fromkeys(range(geometry.B), 0)  # entries of a row before the document
        for row, start, length in _npu.documents(whole):
            # Its tokens that are queries here: all, or those in a part of the row.
            begin, end = max(geometry.start - start, 0), min(geometry.start + T - start, length)
            for remainder in range(rate if begin < end else 0):
                first = begin + (remainder - begin) % rate
                # The last query of the group stands at `last`, and sees as many entries as the group compares.
                last = first + (end - 1 - first) // rate * rate
                compared = (last + 1) // rate
                if compared and first <= last:
                    at = row * T + start - geometry.start + first
                    queries.append(steps[: (last - first) // rate + 1] * rate + at)
                    keys.append(steps[:compared] + row * entries.count + seen[row])
                    ends.append((len(queries[-1]), compared))
            seen[row] += length // rate
        empty = torch.zeros(0, dtype=torch.long)
        sizes = torch.tensor(ends, dtype=torch.int32).view(-1, 2).cumsum(0, dtype=torch.int32)
        place = lambda x: x.to(entries.first_BT.device)  # noqa: E731
        self.queries = place(torch.cat([*queries, empty]))
        self.keys = place(torch.cat([*keys, empty]))
        self.query_ends, self.key_ends = place(sizes[:, 0].contiguous()), place(sizes[:, 1].contiguous())

    @classmethod
    def of(cls, geometry: Geometry, rate: int) -> Groups:
        """The groups of a geometry, made once."""
        kept = geometry.__dict__.setdefault("_indexer_groups", {})
        if rate not in kept:
            kept[rate] = cls(geometry, rate)
        return kept[rate]


def _select(q_BTHK, keys_BCK, weights_BTH, geometry: Geometry, rate: int, S: int) -> tuple[Tensor, Tensor]:
    """The selection ``[B, T, S]`` and whether somewhere a choice among zeros was made."""
    (B, T, H, K), entries, groups = q_BTHK.shape, geometry.entries(rate), Groups.of(geometry, rate)
    index, values = _npu.call(
        OPERATORS[0],
        q_BTHK.reshape(B * T, H, K).index_select(0, groups.queries),
        keys_BCK.reshape(-1, 1, K).index_select(0, groups.keys),
        weights_BTH.reshape(B * T, H).index_select(0, groups.queries),
        actual_seq_lengths_query=groups.query_ends,
        actual_seq_lengths_key=groups.key_ends,
        layout_query="TND",
        layout_key="TND",
        sparse_count=S,
        sparse_mode=3,
        return_value=True,
    )
    # Entries come counted from the group's first; the row's count starts where the document's entries do.
    first_M1 = entries.first_BT.reshape(-1, 1).index_select(0, groups.queries)
    visible_M1 = entries.visible_BT.reshape(-1, 1).index_select(0, groups.queries)
    index_MS, values_MS = index.view(-1, S).long(), values.view(-1, S)
    taken_MS = (index_MS >= 0) & (index_MS < visible_M1)
    selected_MS = torch.where(taken_MS, index_MS + first_M1, -1)
    choice = ((visible_M1 > S) & (values_MS.amin(-1, keepdim=True) == 0)).any()
    selected = torch.full((B * T, S), -1, dtype=torch.long, device=q_BTHK.device)
    return selected.index_copy_(0, groups.queries, selected_MS).view(B, T, S), choice


@torch.no_grad()
def indexer_select(
    q_BTHK: Tensor, keys_BCK: Tensor, weights_BTH: Tensor, geometry: Geometry, *, rate: int, topk: int
) -> Tensor:
    """See ``reference.indexer_select``."""
    H, K, S = *q_BTHK.shape[2:], min(topk, keys_BCK.shape[1])
    if not S or _npu.outside(
        "indexer_select",
        (K != 128, f"npu_lightning_indexer takes heads of 128 channels, not {K}"),
        (H > 64, f"npu_lightning_indexer takes at most 64 heads, not {H}"),
        (S not in COUNTS, f"npu_lightning_indexer selects up to 2048, or 3072 … 8192 by 1024, but not {S}"),
    ):
        return by_torch(q_BTHK, keys_BCK, weights_BTH, geometry, rate=rate, topk=topk)
    if not len(Groups.of(geometry, rate).queries):
        return q_BTHK.new_full((*q_BTHK.shape[:2], S), -1, dtype=torch.long)
    selected_BTS, choice = _select(q_BTHK, keys_BCK, weights_BTH, geometry, rate, S)
    if _npu.happens(choice):
        _npu.fallen_back("indexer_select", "a choice among entries of score zero goes by their order")
        return by_torch(q_BTHK, keys_BCK, weights_BTH, geometry, rate=rate, topk=topk)
    return selected_BTS
