"""The real W&B, offline: what was logged can be read back, and nothing lies outside the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WRITER = """
import sys
from pathlib import Path
from lab_utils.recipe import Recipe
from lab_utils.telemetry.names import METRICS
from lab_utils.telemetry.wandb import WandbSink

run_dir, first = Path(sys.argv[1]), int(sys.argv[2])
sink = WandbSink()
sink.open(run_dir, Recipe.load("sft_tiny"), {"git": {"commit": "abc"}, "diff": "long", "packages": {}})
names = {"{fn}": "format", "{leaf}": "entropy", "{bench}": "gsm8k"}
keys = list(METRICS)
for placeholder, name in names.items():
    keys = [key.replace(placeholder, name) for key in keys]
for step in range(first, first + 3):
    sink.log(step, {key: step + i / 1000 for i, key in enumerate(keys)})
sink.event("checkpoint", "step 3")
sink.close("succeeded")
"""


def records(path: Path):
    """Records of a .wandb file: LevelDB's log framing around protocol buffers; stops at a cut end."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0 or at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record, parts = Record.FromString(parts), b""
            yield record


def history(path: Path) -> dict[int, dict]:
    table = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            table[items["train/global_step"]] = items
    return table


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path, str]:
    """A run that was logged in two attempts, the home of its user, and what its processes called."""
    folder = tmp_path_factory.mktemp("wandb")
    run_dir, home = folder / "trial-20260101-000000-abcdef", folder / "home"
    run_dir.mkdir()
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    for first in (1, 4):
        done = subprocess.run(
            [sys.executable, "-c", WRITER, str(run_dir), str(first)],
            env={**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return run_dir, home, done.stdout + done.stderr


def test_every_metric_is_read_back_as_it_was_logged(run):
    from lab_utils.telemetry.names import METRICS

    first, second = sorted(run[0].glob("wandb/offline-run-*/run-*.wandb"))
    rows = history(first) | history(second)
    assert sorted(rows) == [1, 2, 3, 4, 5, 6]
    logged = {key for key in rows[5] if not key.startswith("_")}
    assert len(logged) == len(METRICS)
    for i, key in enumerate(METRICS):
        if "{" not in key and key != "train/global_step":
            assert rows[5][key] == pytest.approx(5 + i / 1000)


def test_the_step_is_the_axis_and_both_attempts_are_one_run(run):
    ids, axes, runs = set(), set(), []
    for path in run[0].glob("wandb/offline-run-*/run-*.wandb"):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                runs.append(record.run)
            elif kind == "metric" and (record.metric.glob_name == "*" or record.metric.name == "*"):
                axes.add(record.metric.step_metric)
    assert len(ids) == 1 and axes == {"train/global_step"}
    assert {(r.run_group, r.job_type, r.display_name) for r in runs} == {(run[0].name, "node-0", run[0].name)}


def test_everything_lies_inside_the_run_directory(run):
    run_dir, home, _ = run
    assert [p for p in home.rglob("*") if p.is_file()] == []
    assert [p for p in run_dir.parent.iterdir() if p not in (run_dir, home)] == []
    assert {p.name for p in run_dir.iterdir()} == {"wandb"}


def test_it_says_nothing_on_the_console(run):
    assert run[2] == ""
