"""Pieces of the twin that need neither torch's fake tensors nor a job."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lab_utils.engine.twin.collectives import Collective, Record, check, from_json, summary, to_json
from lab_utils.engine.twin.ledger import KINDS, Ledger

WORLD, EXPERTS = (0, 1, 2, 3), (0, 1)


def call(kind: str = "all_reduce", ranks: tuple[int, ...] = WORLD, size: int = 8, **more) -> Collective:
    return Collective(kind, "world" if ranks == WORLD else "experts", ranks, "float32", size, size, **more)


def order(*calls: Collective | tuple[Collective, ...]) -> list[Collective]:
    record = Record()
    for one in calls:
        record.add(*(one if isinstance(one, tuple) else (one,)))
    return record.entries


def stage_orders() -> dict[int, list[Collective]]:
    """Two stages of two ranks: experts talk within a stage, streams go on, gradients come back, all meet at the end."""
    first, second = (0, 1), (2, 3)
    orders = {}
    for rank in WORLD:
        own, other = (first, rank + 2) if rank in first else (second, rank - 2)
        forward = "send" if rank in first else "recv"
        backward = "recv" if rank in first else "send"
        exchange = call("all_to_all", own, 64, uneven=True)
        hand_on = call(forward, (rank, other), 32, peer=other)
        hand_back = call(backward, (rank, other), 32, peer=other)
        steps = [exchange, hand_on, hand_back] if rank in first else [hand_on, exchange, hand_back]
        orders[rank] = order(*steps, call())
    return orders


def test_a_step_in_order_passes() -> None:
    assert check(stage_orders()) == []


def test_calls_on_some_ranks_of_a_group_are_enough_to_pass() -> None:
    """Of 2,048 ranks one of each stage runs."""
    orders = stage_orders()
    assert check({rank: orders[rank] for rank in (0, 2)}) == []


@pytest.mark.parametrize(
    "rank, place, change",
    [
        (3, -1, {"bytes": 16}),
        (2, -1, {"dtype": "bfloat16"}),
        (1, -1, {"kind": "barrier"}),
        (2, 0, {"bytes": 48}),
        (2, 0, {"kind": "send"}),
    ],
)
def test_a_planted_mismatch_is_found(rank: int, place: int, change: dict) -> None:
    orders = stage_orders()
    orders[rank][place] = replace(orders[rank][place], **change)
    found = check(orders)
    assert len(found) == 1 and rank in found[0].ranks
    assert f"ank {rank}" in found[0].sentence


def test_a_call_that_one_rank_leaves_out_is_a_hang() -> None:
    orders = stage_orders()
    del orders[1][0]  # an all-to-all of the first stage
    found = check(orders)
    assert found and "hang" in found[0].sentence


def test_two_groups_in_another_order_are_a_hang() -> None:
    one, other = call(size=8), call(ranks=EXPERTS, size=4)
    orders = {0: order(one, other), 1: order(other, one)}
    found = check(orders)
    assert found and found[0].ranks == (0, 1)


def test_messages_of_one_batch_pass_each_other() -> None:
    """Both sides send and receive at once; one after the other they would wait for ever."""
    pair = (0, 1)
    send, recv = (lambda peer: call("send", pair, peer=peer)), (lambda peer: call("recv", pair, peer=peer))
    assert check({0: order((send(1), recv(1))), 1: order((send(0), recv(0)))}) == []
    assert check({0: order((send(1), recv(1))), 1: order(recv(0), send(0))}) == []
    assert check({0: order(recv(1), send(1)), 1: order(recv(0), send(0))})


@given(st.lists(st.sampled_from(["all_reduce", "barrier", "all_gather"]), max_size=8), st.data())
def test_equal_orders_pass_and_a_shorter_one_never_does(kinds: list[str], data: st.DataObject) -> None:
    calls = [call(kind, EXPERTS, size=i) for i, kind in enumerate(kinds)]
    assert check({0: order(*calls), 1: order(*calls)}) == []
    if calls:
        gone = data.draw(st.integers(0, len(calls) - 1))
        assert check({0: order(*calls), 1: order(*(calls[:gone] + calls[gone + 1 :]))})


def test_an_order_survives_its_file() -> None:
    for entries in stage_orders().values():
        assert from_json(to_json(entries)) == entries


def test_a_summary_adds_up_calls_alike() -> None:
    rows = summary(order(call(), call(ranks=EXPERTS, size=4), call()))
    assert [(row["kind"], row["group"], row["count"], row["bytes"]) for row in rows] == [
        ("all_reduce", "world", 2, 16),
        ("all_reduce", "experts", 1, 4),
    ]


def test_calls_again_keep_their_batches() -> None:
    record = Record()
    record.add(call(), call(size=4))
    record.add(call(size=2))
    record.again(0, 3)
    assert [entry.step for entry in record.entries] == [0, 0, 1, 2, 2, 3]
    assert [entry.bytes for entry in record.entries] == [8, 4, 2] * 2


def test_a_view_counts_once_and_a_block_goes_with_its_last_view() -> None:
    ledger = Ledger()
    whole = torch.empty(1024)
    ledger.see(whole, "empty")
    view = whole[:512]
    ledger.see(view, "slice")
    assert ledger.held()["temporary"] == 4096
    del whole
    gc.collect()
    assert ledger.held()["temporary"] == 4096
    del view
    gc.collect()
    assert ledger.held()["temporary"] == 0
    assert ledger.peak().bytes == 4096


def test_the_peak_is_the_fullest_moment_with_its_kinds() -> None:
    ledger = Ledger()
    kept = torch.empty(256)
    ledger.see(kept, "kept")
    ledger.settle()
    scratch = torch.empty(1024)
    ledger.see(scratch, "scratch")
    del scratch
    small = torch.empty(16)
    ledger.see(small, "small")
    peak = ledger.peak()
    assert peak.bytes == 5120
    assert peak.by_kind == {**dict.fromkeys(KINDS, 0), "activations": 1024, "temporary": 4096}
    assert [block.what for block in peak.blocks] == ["scratch", "kept"]
    assert ledger.most("activations") == 1024


def test_a_kind_may_be_known_late() -> None:
    ledger = Ledger()
    moment = torch.empty(8)
    ledger.see(moment, "zeros")
    before = ledger.peak().by_kind["temporary"]
    ledger.name(moment, "moments", "exp_avg of a weight")
    assert (before, ledger.peak().by_kind["moments"]) == (32, 32)


def test_a_flash_adds_to_the_peak_and_leaves_nothing() -> None:
    ledger = Ledger()
    old = torch.empty(64)
    ledger.see(old, "old")
    block = ledger.of(old)
    ledger.flash([block, block], credit=[block])
    assert ledger.peak().bytes == 512
    assert ledger.held()["temporary"] == 256
