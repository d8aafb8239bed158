"""What a recipe costs: who holds which bytes, what fits, and which knob makes room."""

from dataclasses import replace

import pytest

from lab_utils.planner import estimate as planner
from lab_utils.planner.estimate import GIB, Estimate, estimate, knobs
from lab_utils.recipe import Recipe

PARTS = {"routed experts": 800, "attention": 160, "embedding": 40, "head": 24}


def recipe(**changes) -> Recipe:
    start = {"cluster.nproc": 8, "schedule.batch_tokens": 512 * 64}
    return Recipe.load("sft_tiny").with_changes(start | {k.replace("__", "."): v for k, v in changes.items()})


def state(**changes) -> tuple[float, float, float]:
    return planner._state_bytes(recipe(**changes), PARTS)


def test_zero_cuts_the_optimizers_state_alone():
    assert state(parallel__zero=0) == (1024 * 4, 1024 * 4, 1024 * 8)
    assert state() == (1024 * 4, 1024 * 4, 1024 * 8 / 8)
    # Below fp32 the weights halve, gradients stay fp32, and the optimizer keeps a master copy.
    assert state(model__dtype="bfloat16") == (1024 * 2, 1024 * 4, 1024 * 12 / 8)


def test_ep_cuts_experts_and_their_state_lies_on_fewer_replicas():
    own = 800 / 4 + 160 + 64
    assert state(parallel__ep=4) == (own * 4, own * 4, 800 / 4 * 8 / 2 + (160 + 64) * 8 / 8)


def test_pp_cuts_layers_and_parts_the_embedding_from_the_head():
    weights, _, optimizer = state(parallel__pp=2)
    own = (800 + 160) / 2 + 40
    assert (weights, optimizer) == (own * 4, own * 8 / 4)


def test_muon_keeps_one_moment_of_what_it_updates():
    assert state(optim__kind="muon")[2] == (960 * 4 + 64 * 8) / 8


@pytest.fixture
def described(monkeypatch):
    """A model of a thousand parameters on a device of a fixed size, in place of real ones."""
    from lab_utils.models import load

    model = {"parameters": 1024, "by_component": PARTS, "flops_per_token": 100.0}
    monkeypatch.setattr(load, "describe", lambda source, document_length: model)
    monkeypatch.setattr(planner, "_device", lambda recipe: ("npu", 64 * GIB, 1e6))


def test_time_is_shared_by_every_rank_stages_included(described):
    found = estimate(recipe(parallel__pp=2))
    assert found.ranks == 8 and found.flops_per_step == 100.0 * 512 * 64
    assert found.step_seconds == pytest.approx(found.flops_per_step / (1e6 * 8 * 0.35))
    assert found.device_hours == pytest.approx(found.total_seconds * 8 / 3600)
    assert found.fits is True and knobs(recipe(parallel__pp=2), found) == []


def test_offload_moves_the_optimizers_state_to_the_host(described):
    there, here = estimate(recipe(parallel__offload=True)), estimate(recipe())
    assert there.optimizer_gib == 0 and there.host_gib == here.optimizer_gib > 0
    assert there.state_gib == here.state_gib - here.optimizer_gib


def test_devices_that_are_not_here_leave_time_and_room_unknown():
    away = recipe(cluster__launcher="slurm")
    assert planner._device(away) == ("auto", None, None)
    assert planner._device(away.with_changes({"cluster.accelerator": "npu"})) == ("npu", None, None)


def cost(**changes) -> Estimate:
    base = Estimate(1, 1, 1, 8, 1.0, 20.0, 20.0, 40.0, 0.0, "npu", 64.0, None, 0.35, None)
    return replace(base, **changes)


def test_what_does_not_fit_names_knobs_that_are_not_yet_turned():
    assert (
        cost().fits is False and cost(device_gib=None).fits is None and cost(optimizer_gib=1.0).fits is True
    )
    told = " ".join(knobs(recipe(parallel__zero=0), cost()))
    assert (
        told.index("parallel.zero=1")
        < told.index("parallel.offload=true")
        < told.index("model.dtype=bfloat16")
    )
    assert "it takes 13 ranks or more" in told
    turned = recipe(parallel__offload=True, model__dtype="bfloat16")
    (only,) = knobs(turned, cost())
    assert only.startswith("parallel.ep and parallel.pp")
    assert "offload" not in " ".join(knobs(recipe(), cost(device="cpu"))), "a CPU's memory is the host's"
