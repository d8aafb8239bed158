"""Which layouts are valid, and who holds what, beside the engine's own answers."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.errors import LayoutError
from lab_utils.planner import state
from lab_utils.planner.numbers import numbers, size
from lab_utils.planner.placed import deal_layers, place
from lab_utils.planner.state import state_of
from lab_utils.recipe import Recipe


def recipe(source="preset:tiny", **changes) -> Recipe:
    tree = {"model": {"source": source}, "data": {"train": [{"manifest": "any"}], "row_tokens": 64}}
    return Recipe.parse(tree).with_changes({"schedule.batch_tokens": 64 * 64, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parallel.pp": 3}, "parallel.pp=3 does not divide 8 ranks"),
        ({"parallel.ep": 3}, "parallel.ep=3 does not divide the 8 data-parallel ranks"),
        ({"parallel.pp": 8}, "the model has 4 layers"),
        ({"schedule.batch_tokens": 64 * 4, "parallel.pp": 4}, "needs at least 4 micro-batches"),
    ],
)
def test_what_the_engine_refuses_is_refused_in_its_words(changes, says):
    with pytest.raises(LayoutError, match=says):
        place(recipe(**changes), 8)


def test_experts_must_divide():
    with pytest.raises(LayoutError, match=r"parallel\.ep=32 does not divide the model's 16 experts"):
        place(recipe(**{"parallel.ep": 32}), 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "ranks", "degrees", "mtp"),
    [
        ("preset:tiny", 8, {"ep": 2, "pp": 2, "virtual_stages": 2}, True),
        ("preset:pro", 2048, {"ep": 64, "pp": 16, "virtual_stages": 1}, True),
        ("preset:pro", 2048, {"ep": 128, "pp": 8, "virtual_stages": 2}, False),
    ],
)
def test_each_stage_holds_what_the_real_plugin_and_policy_leave_it(source, ranks, degrees, mtp):
    options = {"source": source, "ranks": ranks, "parallel": degrees, "mtp": mtp}
    command = [sys.executable, "-m", "lab_utils.engine.shards", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.strip().splitlines()[-1])["stages"]
    changes = {f"parallel.{name}": value for name, value in degrees.items()}
    batch = 64 * ranks * 16
    laid = recipe(
        source, **changes, **{"model.mtp_loss": 0.1 if mtp else 0.0, "schedule.batch_tokens": batch}
    )
    placed = place(laid.with_changes({"schedule.micro_rows": 1}), ranks)
    for stage, row in zip(placed.stages, theirs, strict=True):
        own = state_of(placed, stage.index, muon=True, zero=1)
        assert [list(pair) for pair in stage.ranges] == [list(pair) for pair in row["layers"]]
        assert (own.dense, own.experts) == (row["dense"], row["experts"])


@pytest.mark.parametrize(("experts", "shards"), [(False, 8), (False, 2), (True, 2), (True, 1)])
def test_buckets_of_whole_matrices_are_those_of_the_engine(experts, shards):
    import torch

    from lab_utils.engine import placement
    from lab_utils.planner.numbers import layer_shapes

    n = numbers("preset:flash")
    shapes = [
        (f"model.layers.{i}.{name}", s) for i in range(2, 6) for name, s in layer_shapes(n, *n.kind(i), 32)
    ]
    chosen = [(name, s) for name, s in shapes if (".mlp.experts." in name) == experts]
    views = [state._matrices(name, s, n) for name, s in chosen]
    muon = [(name, s, v) for (name, s), v in zip(chosen, views, strict=True) if v]
    sharding = SimpleNamespace(shards=shards, shard=0)
    items = [(name, torch.nn.Parameter(torch.empty(s, device="meta")), sharding) for name, s, _ in muon]
    buckets = list(placement._whole_places(items, sharding, state.BUCKET_ELEMENTS, n))
    own = state._deal(tuple(v for _, _, v in muon), shards)
    assert own.elements == sum(shards * width for _, width in buckets)
    assert own.bucket == max(shards * width for _, width in buckets)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 5, 8, 12, 16]), st.sampled_from([1, 2, 3]), st.booleans())
def test_every_layer_lies_in_one_stage(pp, v, mtp):
    n = numbers("preset:pro")
    stages = deal_layers(n, pp, v if pp > 1 else 1, mtp)
    layers = sorted(layer for stage in stages for layer in stage.layers)
    assert layers == list(range(n.num_hidden_layers))
    assert stages[0].first and stages[-1].last


def test_masters_over_all_ranks_are_the_parameters_once():
    laid = recipe(**{"optim.kind": "adamw", "parallel.ep": 2, "schedule.batch_tokens": 64 * 64})
    placed = place(laid, 4)
    own = state_of(placed, 0, muon=False, zero=1)
    n = placed.numbers
    held = size((own.dense,)) / placed.dp + own.experts / placed.moe_dp
    assert (
        held <= own.own_adamw <= held + 200 * len(n.layer_types)
    )  # slices are rounded up, a parameter at a time


def test_less_is_in_flight_towards_the_end_of_the_pipeline():
    laid = recipe("preset:pro", **{"parallel.pp": 8, "schedule.batch_tokens": 64 * 8 * 64})
    flying = [place(laid, 64).in_flight(s) for s in range(8)]
    assert flying == [8, 7, 6, 5, 4, 3, 2, 1]
    twice = laid.with_changes({"parallel.virtual_stages": 2})
    assert [place(twice, 64).in_flight(s) for s in (0, 7)] == [(14 + 8 + 1) / 2, (8 + 1) / 2]
