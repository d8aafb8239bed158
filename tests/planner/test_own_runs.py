"""``lab bench plan``: what runs are made, what is kept of them, and by which steps they are predicted."""

import pytest
import yaml

from lab_utils.bench import plan as bench
from lab_utils.planner.fitted import FITTED_ON
from lab_utils.planner.own import QUANTITIES, machines, predicted


@pytest.fixture
def made(monkeypatch):
    """Stand-ins for the jobs: every run takes a hundredth of a second longer than the one before."""
    asked = []

    def told(ranks, *, layouts, follow, steps, accelerator, source, rows, row_tokens):
        assert (source, rows, row_tokens, layouts[0]) == asked[-1] and follow
        return [{"peak_mib": 500.0 + len(asked), "tensors_mib": 100.0 + len(asked), "tokens_per_s": 1.0}]

    def taken(ranks, runs, steps):
        run = runs[-1]
        asked.append((run["source"], run["rows"], run["row_tokens"], run["layout"]))
        assert [(each["source"], each["rows"] // ranks, each["row_tokens"]) for each in runs[:-1]] == [
            *FITTED_ON
        ]
        return [4.0, 0.2, 1.0 + 0.01 * len(asked)]

    monkeypatch.setattr(bench, "bench_layout", told)
    monkeypatch.setattr(bench, "seconds_of", taken)
    monkeypatch.setattr(bench, "measure", lambda: {"cores": 2, "steps": []})
    monkeypatch.setattr(bench, "tree_of", lambda found: machines()[0]["cluster"])
    return asked


def test_every_size_under_every_layout_is_run_and_written(made, tmp_path):
    found = bench.bench_plan(2, 5)
    assert len(made) == len(set(made)) == len(found["runs"]) == len(bench.SIZES) * len(bench.LAYOUTS)
    for place, run in enumerate(found["runs"], start=1):
        assert run["seconds"] == pytest.approx(1.0 + 0.01 * place) and run["beside"] == [4.0, 0.2]
        assert run["peak_mib"] == 500.0 + place and run["tensors_mib"] == 100.0 + place
        assert run["predicted"] == predicted(found["cluster"], run) and set(QUANTITIES) <= set(run)

    bench.write(found, tmp_path / "own.yaml")
    written = yaml.safe_load((tmp_path / "own.yaml").read_text())
    assert "predicted" not in written["runs"][0] and written["cluster"] == found["cluster"]


def test_a_run_is_predicted_for_a_machine_as_fast_as_the_steps_beside_it_say():
    run = {**machines()[0]["runs"][0], "beside": [4.0, 0.2]}
    usual, slow = (
        predicted(machines()[0]["cluster"], {**run, "beside": b}) for b in ([4.0, 0.2], [8.0, 0.4])
    )
    # The large step is the run's own layout and size: it is met, whatever the cluster's file says of the machine.
    assert usual["seconds"] == pytest.approx(4.0, rel=0.01) and slow["seconds"] == pytest.approx(
        8.0, rel=0.01
    )
    assert usual["tensors_mib"] == slow["tensors_mib"] and usual["peak_mib"] == slow["peak_mib"]
