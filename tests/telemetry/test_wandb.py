"""The real W&B, offline, read back by its own tool: what was logged is there, and nothing lies outside the run."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab_utils.errors import RunError
from lab_utils.recipe import Recipe
from lab_utils.telemetry import jsonl, wandb_reader
from lab_utils.telemetry.wandb import MAX_FILES, WandbSink, config_of, run_id, samples, scores

WRITER = """
import json, math, os, sys, time
from pathlib import Path
from lab_utils.recipe import Recipe
from lab_utils.telemetry.names import METRICS
from lab_utils.telemetry.sinks import make_sinks

run_dir, first, node = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
provenance = json.loads((run_dir / "provenance.json").read_text())
sinks = make_sinks(Recipe.load("sft_tiny"), console=False, node=node)
sinks.open(run_dir, Recipe.load("sft_tiny"), {**provenance, "accelerator": {"kind": "npu"}})
names = {"{fn}": "format", "{leaf}": "entropy", "{bench}": "gsm8k", "{family}": "units", "{teacher}": "0"}
keys = list(METRICS)
for placeholder, name in names.items():
    keys = [key.replace(placeholder, name) for key in keys]
if node:
    keys = [key for key in keys if key.startswith("chip/")]
for step in range(first, first + 3):
    sinks.log(step, {key: step + i / 1000 for i, key in enumerate(keys) if key != "train/global_step"})
    if not node:
        sinks.log(step, {"eval/loss": math.nan if step == 2 else 0.1 + step, "eval/perplexity": math.inf})
time.sleep(float(os.environ.get("HOLD", 0)))
sinks.event("checkpoint", "step 3")
sinks.close("succeeded")
assert not sinks.dropped, sinks.dropped
"""
PROVENANCE = {
    "git": {"commit": "abc", "diff": "a long text", "untracked": ["x"], "dirty": True},
    "packages": {"torch": "2"},
    "data": {"ascent-tasks-sft": {"version": "1", "sha256": {"a.jsonl": "11", "b.jsonl": "22"}}},
}
REPORT = {
    "exact_match": {"value": 0.75, "interval": [0.7, 0.8]},
    "perplexity": None,
    "notes": {"perplexity": "no texts"},
    "base": {"exact_match": {"value": 0.25}},
}


def environment(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return {**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1"}


def write(run_dir: Path, home: Path, *nodes: tuple[int, int], **variables: str) -> str:
    """Processes that log at the same time, each a (first step, node); returns what they said."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run_dir), str(first), str(node)],
            env={**environment(home), **variables},
            cwd=run_dir.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for first, node in nodes
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(nodes), said
    return "".join(said)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path, str]:
    """A run of two nodes that was logged in two attempts, its user's home, and what its processes said."""
    folder = tmp_path_factory.mktemp("wandb")
    run_dir, home = folder / "trial-20260101-000000-abcdef", folder / "home"
    run_dir.mkdir()
    home.mkdir()
    (run_dir / "provenance.json").write_text(json.dumps(PROVENANCE))
    off = {"ASCENT_NPU_EXPORTER": "off"}
    said = write(run_dir, home, (1, 0), (1, 1), **off)
    (run_dir / "report.json").write_text(json.dumps(REPORT))
    for step in (1, 2, 9):
        row = {"step": step, "prompt": "swap", "completion": "paws", "rewards": {"exact": 1.0}}
        jsonl.append(run_dir / "samples.jsonl", row)
    said += write(run_dir, home, (3, 0), **off)
    return run_dir, home, said


READ = wandb_reader.records


@functools.cache
def records(piece: wandb_reader.Piece) -> list[dict]:
    """Read once: each call of W&B's tool takes seconds."""
    return list(READ(piece))


def of_kind(run_dir: Path, kind: str) -> list[dict]:
    chains = wandb_reader.pieces(run_dir).values()
    return [r[kind] for chain in chains for piece in chain for r in records(piece) if r["type"] == kind]


@pytest.mark.slow
def test_every_metric_is_read_back_as_it_was_logged(run, monkeypatch):
    from lab_utils.telemetry.names import METRICS

    result = wandb_reader.compare(run[0])
    assert result["equal"] and result["missing"] == 0 and result["lines"] == 12
    assert result["values"] == 6 * len(METRICS) + 6 * 3
    monkeypatch.setattr(wandb_reader, "records", records)
    lines = wandb_reader.history(run[0])
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5]
    assert math.isnan(lines[3]["eval/loss"]) and math.isinf(lines[3]["eval/perplexity"])


@pytest.mark.slow
def test_a_difference_is_found(run, monkeypatch):
    monkeypatch.setattr(wandb_reader, "records", records)
    path = run[0] / "metrics.jsonl"
    written = path.read_text()
    rows = list(jsonl.read(path))
    rows[4]["train/loss"] += 1e-9
    rows.append({"step": 6, "train/loss": 1.0})  # W&B was killed before it wrote this one
    path.write_text("".join(map(jsonl.encode, rows)))
    try:
        result = wandb_reader.compare(run[0])
    finally:
        path.write_text(written)
    assert not result["equal"] and result["missing"] == 1
    assert [(d["step"], d["key"]) for d in result["differences"]] == [(3, "train/loss")]


@pytest.mark.slow
def test_a_node_is_a_run_of_its_own_in_the_runs_group(run, monkeypatch):
    monkeypatch.setattr(wandb_reader, "records", records)
    name = run[0].name
    runs = of_kind(run[0], "run")
    assert {(r["run_id"], r["run_group"], r["job_type"]) for r in runs} == {
        (run_id(f"{name}/node-{k}"), name, f"node-{k}") for k in (0, 1)
    }
    assert len(runs) == 3  # two attempts of the first node
    assert all(r["resumed"] is False for r in runs if "resumed" in r)
    lines = wandb_reader.history(run[0], node=1)
    assert [line["step"] for line in lines] == [1, 2, 3]
    keys = {key for line in lines for key in line} - {"step", "train/global_step"}
    assert keys and all(key.startswith("chip/") for key in keys)
    axes = {m.get("step_metric") for m in of_kind(run[0], "metric") if m.get("glob_name") == "*"}
    assert axes == {"train/global_step"}


@pytest.mark.slow
def test_recipe_provenance_and_manifests_are_kept_and_the_diff_is_not(run):
    config = of_kind(run[0], "run")[0]["config"]["update"]
    assert config["recipe"]["name"] == "sft_tiny" and len(config["recipe_hash"]) == 64
    assert config["provenance"]["git"] == {"commit": "abc", "dirty": True}
    (manifest,) = config["manifests"]
    assert manifest["name"] == "ascent-tasks-sft" and manifest["files"] == ["11  a.jsonl", "22  b.jsonl"]
    assert "a long text" not in json.dumps(config) and "torch" not in json.dumps(config["provenance"])


@pytest.mark.slow
def test_samples_and_scores_are_there_at_the_end(run):
    chain = wandb_reader.pieces(run[0])[run_id(f"{run[0].name}/node-0")]
    first, second = (
        {
            key: value
            for record in records(piece)
            if record["type"] == "summary"
            for key, value in record["summary"]["update"].items()
        }
        for piece in chain
    )
    assert second["report/exact_match"] == 0.75 and second["report/base/exact_match"] == 0.25
    assert "report/exact_match" not in first and second["state"] == "succeeded"
    (table,) = chain[1].path.glob("files/media/table/samples_*.json")
    found = json.loads(table.read_text())
    assert found["columns"] == ["step", "prompt", "completion", "rewards"]
    assert found["data"][0] == [1, "swap", "paws", '{"exact": 1.0}'] and len(found["data"]) == 3
    steps = [
        item["train/global_step"]
        for record in records(chain[1])
        if "samples.nrows" in (item := (record.get("history") or {}).get("item") or {})
    ]
    assert steps == [9]


@pytest.mark.slow
def test_everything_lies_inside_the_run_directory(run):
    run_dir, home, _ = run
    assert [p for p in home.rglob("*") if p.is_file()] == []
    assert [p for p in run_dir.parent.iterdir() if p not in (run_dir, home)] == []
    known = {"wandb", "metrics.jsonl", "events.jsonl", "samples.jsonl", "report.json", "provenance.json"}
    assert {p.name for p in run_dir.iterdir()} == known


@pytest.mark.slow
def test_it_says_nothing_on_the_console(run):
    assert run[2] == ""


@pytest.mark.slow
def test_an_exporters_chips_have_stable_names(tmp_path, exporter):
    run_dir = tmp_path / "trial-20260101-000000-abcdef"
    run_dir.mkdir()
    (run_dir / "provenance.json").write_text("{}")
    write(run_dir, tmp_path, (1, 0), ASCENT_NPU_EXPORTER=exporter.url, WANDB_X_STATS_SAMPLING_INTERVAL="0.2")
    items = {k: v for record in of_kind(run_dir, "stats") for k, v in record["item"].items()}
    assert items["openmetrics.npu0.npu_chip_info_power.0"] == 305.5
    assert items["openmetrics.npu1.npu_chip_info_utilization.0"] == 3
    # A name has the series of its own chip alone.
    assert {k for k in items if "openmetrics" in k and not k.endswith(".0")} == set()
    assert "openmetrics.npu1.npu_chip_info_power.0" not in items


def test_a_run_without_offline_data_is_said(tmp_path):
    with pytest.raises(RunError, match="no offline W&B run"):
        wandb_reader.compare(tmp_path)


def test_many_files_of_a_manifest_are_one_hash():
    data = {"big": {"revision": "r1", "sha256": {f"{i}.parquet": str(i) for i in range(MAX_FILES + 1)}}}
    recipe = Recipe.load("sft_tiny")
    (manifest,) = config_of(recipe, {"data": data})["manifests"]
    assert "files" not in manifest and manifest["revision"] == "r1" and len(manifest["sha256"]) == 64
    data["big"]["sha256"]["3.parquet"] = "other"
    assert config_of(recipe, {"data": data})["manifests"][0]["sha256"] != manifest["sha256"]


def test_results_that_are_not_there_are_nothing(tmp_path):
    assert scores(tmp_path) == {} and samples(tmp_path) == ([], [], 0)
    (tmp_path / "report.json").write_text("half a fi")
    assert scores(tmp_path) == {}


@pytest.mark.parametrize(
    "online, kind, sent", [(True, "alert_nan", 1), (False, "alert_nan", 0), (True, "note", 0)]
)
def test_an_alert_becomes_a_notification_where_the_run_is_online(tmp_path, online, kind, sent):
    alerts, sink = [], WandbSink()
    sink._dir, sink._online = tmp_path, online
    sink._run = SimpleNamespace(summary={}, alert=lambda **words: alerts.append(words))
    sink.event(kind, "Step 3: loss not finite.")
    assert sink._run.summary == {f"event/{kind}": "Step 3: loss not finite."}
    assert [a["text"] for a in alerts] == ["Step 3: loss not finite."] * sent
