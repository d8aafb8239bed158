"""Parts of packed rows: what they compute, put together, is what the whole rows give."""

from __future__ import annotations

import pytest
import torch

from kernels._cases import between, normal, packed, whole
from kernels.compressor.reference import compressor
from kernels.geometry import Geometry
from kernels.indexer_select.reference import indexer_select
from kernels.row_part import RowPart
from kernels.shared_kv_attention.reference import shared_kv_attention


def rows_of(g: torch.Generator, single: bool, ranks: int, shortest: int):
    B, T = between(g, 1, 3), ranks * between(g, shortest, 3 * shortest)
    return whole(B, T) if single else packed(g, B, T, max(3, 2 * T // 3))


def with_before(x_BT: torch.Tensor, part: RowPart) -> torch.Tensor:
    front = min(part.before, part.start)
    found = x_BT[:, part.start - front : part.stop]
    return torch.cat([found.new_zeros(len(found), part.before - front, *found.shape[2:]), found], 1)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("rate, overlap", [(4, True), (3, False), (16, False)])
@pytest.mark.parametrize("seed", range(4))
def test_entries_pooled_by_parts_are_those_of_the_row(rate, overlap, single, seed):
    g = torch.Generator().manual_seed(seed)
    ranks, before = between(g, 2, 5), 2 * rate
    rows = rows_of(g, single, ranks, before)
    geometry, F = rows.geometry(), 6
    B, T = rows.position_ids.shape
    kv, gate = normal(g, B, T, F), normal(g, B, T, F)
    bias = normal(g, rate, F)
    entries = geometry.entries(rate)
    wanted = compressor(kv, gate, bias, geometry, rate=rate, overlap=overlap)
    parts = [RowPart(geometry, rank, ranks, before) for rank in range(ranks)]
    held = torch.stack(
        [
            compressor(with_before(kv, p), with_before(gate, p), bias, p, rate=rate, overlap=overlap)
            for p in parts
        ],
        1,
    )
    used_BC = torch.arange(entries.count) < (entries.first_BT + entries.visible_BT).amax(1, keepdim=True)
    for part in parts:
        found = held.flatten(0, 2)[part.windows(rate).order].view(wanted.shape)
        torch.testing.assert_close(found * used_BC[..., None], wanted * used_BC[..., None])
    positions = torch.stack([p.windows(rate).positions_BC for p in parts], 1).flatten()
    found = positions[parts[0].windows(rate).order].view(B, -1)
    assert torch.equal(found * used_BC, entries.positions_BC * used_BC)


@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_attention_of_parts_is_that_of_the_row(topk, single, seed):
    g = torch.Generator().manual_seed(seed)
    ranks, rate, window, H, K, R = between(g, 2, 5), 4, 7, 2, 6, 2
    rows = rows_of(g, single, ranks, 8)
    geometry, (B, T) = rows.geometry(), rows.position_ids.shape
    q, kv, entries = normal(g, B, T, H, K), normal(g, B, T, K), normal(g, B, T // rate, K)
    angle, sinks = normal(g, B, T, R), normal(g, H)
    index = normal(g, B, T, 2, 4), normal(g, B, T // rate, 4), normal(g, B, T, 2)
    options = {"window": window, "eps": 1e-6, "entries_BCK": entries, "rate": rate, "want_mass": True}

    def attend(where: Geometry, tokens: slice, kv_BXK: torch.Tensor):
        q_BT, cos, sin, weights = (x[:, tokens] for x in (q, angle.cos(), angle.sin(), index[2]))
        chosen = (
            indexer_select(index[0][:, tokens], index[1], weights, where, rate=rate, topk=topk)
            if topk
            else None
        )
        return shared_kv_attention(q_BT, kv_BXK, sinks, cos, sin, where, selected_BTS=chosen, **options)

    wanted = attend(geometry, slice(0, T), kv)
    parts = [RowPart(geometry, rank, ranks, 8) for rank in range(ranks)]
    found = [attend(p, slice(p.start, p.stop), with_before(kv, p)) for p in parts]
    for x, parts_of_x in zip(wanted, zip(*found, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts_of_x, 1), x)


def test_parts_that_do_not_divide_the_row_or_are_too_short_are_refused():
    geometry = whole(1, 60).geometry()
    for ranks, before in ((7, 1), (4, 16)):
        with pytest.raises(ValueError, match="take fewer parts"):
            RowPart(geometry, 0, ranks, before)
