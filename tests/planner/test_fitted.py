"""The figures of a machine from two of its steps: a machine that is made up must be found again."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import Cluster
from lab_utils.planner.fitted import FITTED_ON, fitted, recipe_of
from lab_utils.planner.memory import stage_memory
from lab_utils.planner.own import machines
from lab_utils.planner.rates import Rates
from lab_utils.planner.search import evaluate


def tree():
    return copy.deepcopy(machines()[0]["cluster"])


def made_up(share: float, calls: float, heap: float, runtime: float):
    found = tree()
    for name in ("sustained", "memory"):
        found["efficiency"][name] = {"value": share, "source": "made up"}
    found["layer_calls_us"] = {"value": 1e6 * calls, "source": "made up"}
    steps = []
    for source, rows, row_tokens in FITTED_ON:
        step = {"source": source, "rows": 2 * rows, "row_tokens": row_tokens, "ranks": 2}
        recipe = recipe_of(step)
        time = evaluate(recipe, Cluster.model_validate(found), 2, Assumptions(imbalance=1.0)).time
        tensors = 1024 * max(stage.seen_by_twin for stage in stage_memory(recipe, 2))
        peak = 1024 * runtime + (1 + heap) * tensors
        steps.append({**step, "seconds": time.seconds, "peak_mib": peak, "resident_mib": 200.0})
    return steps


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 0.9), st.floats(1e-4, 0.05), st.floats(0.0, 0.8), st.floats(0.25, 0.6))
def test_what_a_machine_sustains_is_found_from_two_steps(share, calls, heap, runtime):
    found = fitted(tree(), made_up(share, calls, heap, runtime))
    assert found["efficiency"]["sustained"]["value"] == pytest.approx(share, rel=0.02)
    assert found["efficiency"]["memory"] == found["efficiency"]["sustained"]
    assert found["layer_calls_us"]["value"] == pytest.approx(1e6 * calls, rel=0.05, abs=200)
    assert found["allocator_share"]["value"] == pytest.approx(heap, abs=0.01)
    assert found["runtime_gib"]["value"] == pytest.approx(runtime, rel=0.01)
    Cluster.model_validate(found)


def test_a_machine_without_steps_keeps_its_figures():
    assert fitted(tree(), []) == tree()


def test_tensors_that_fit_a_cache_are_moved_faster_in_proportion_to_their_bytes():
    rates = Rates(Cluster.model_validate(tree()), Assumptions())
    one, large = 2**18, 2**26
    assert rates.moving(1e9, one) < 0.7 * rates.moving(1e9, large)
    assert rates.moving(2e9, one) == pytest.approx(2 * rates.moving(1e9, one))
    points = tree()["efficiency"]["caches"]["points"]
    assert rates.moving(1e9, large) == pytest.approx(1e9 / (rates.bandwidth * points[float(large)]))
