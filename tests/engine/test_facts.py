"""facts.json: what the ranks leave for the run card, once an attempt, and never at the cost of the run."""

import json
from types import SimpleNamespace

import numpy as np

from lab_utils.accelerators import Peak
from lab_utils.data.documents import Documents
from lab_utils.data.loader import PackedLoader
from lab_utils.engine import facts
from lab_utils.engine.engine import Progress
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import create

RECIPE = {"data": {"train": [{"manifest": "ascent-tasks-sft"}], "row_tokens": 64}, "parallel": {"zero": 0}}


def engine(tmp_path, **changes):
    """A stand-in for an Engine that is open."""
    accelerator = SimpleNamespace(
        name="npu", device_name=lambda: "Ascend910_9391", memory=lambda: SimpleNamespace(capacity=64 * 2**30)
    )
    recipe = Recipe.parse(RECIPE)
    made = SimpleNamespace(
        rank=0,
        world=4,
        recipe=recipe,
        accelerator=accelerator,
        progress=Progress(step=5),
        peak=Peak(376e12, "published"),
        dp=2,
        micro_rows=1,
        accumulation=3,
        layout=SimpleNamespace(ep_size=2, pp_size=2),
        parts=SimpleNamespace(
            train=SimpleNamespace(census=lambda: [{"units": 3, "tokens": 30}]),
            validation=None,
            questions=[1, 2],
        ),
        run_dir=create(recipe, tmp_path),
    )
    made.__dict__.update(changes)
    return made


def test_each_attempt_is_added_and_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1800")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    told = engine(tmp_path)
    facts.record(SimpleNamespace(rank=1))
    facts.record(told)
    facts.record(told)
    found = json.loads((told.run_dir.path / facts.FILE).read_text())
    assert len(found["attempts"]) == 2
    attempt = found["attempts"][0]
    assert (attempt["ranks"], attempt["kind"], attempt["device_gib"], attempt["from_step"]) == (
        4,
        "npu",
        64.0,
        5,
    )
    assert (attempt["peak_flops"], attempt["peak_source"]) == (376e12, "published")
    assert attempt["layout"]["zero"] == 0 and attempt["layout"]["accumulation"] == 3
    assert attempt["environment"]["HCCL_CONNECT_TIMEOUT"] == "1800"
    assert "secret" not in json.dumps(found), "nothing but what says how ranks are connected"
    assert found["data"] == {"train": [{"units": 3, "tokens": 30}], "validation": [], "questions": 2}


def test_what_cannot_be_told_is_a_warning(tmp_path, capsys):
    facts.record(engine(tmp_path, parts=SimpleNamespace(train=None)))
    assert "warning: facts.json could not be written" in capsys.readouterr().err


def test_a_loader_counts_each_source_once_whatever_its_weight():
    def documents(*lengths):
        offsets = np.cumsum([0, *lengths])
        return Documents(np.zeros(offsets[-1], np.int32), np.ones(offsets[-1], bool), offsets, "d:train", "k")

    loader = PackedLoader(
        [documents(3, 4), documents(5)], rows_per_step=1, row_tokens=16, seed=0, weights=[0.5, 2.0]
    )
    assert loader.census() == [{"units": 2, "tokens": 7}, {"units": 1, "tokens": 5}]
