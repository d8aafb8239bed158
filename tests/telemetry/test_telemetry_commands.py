"""``lab chips`` and ``lab wandb``: what they print, and one sentence where they can't."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab_utils.errors import RunError
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import create
from lab_utils.telemetry import commands, jsonl, wandb_reader


def run(app, *arguments):
    """The command in this process: its output, or the LabError that it ends with."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    if isinstance(result.exception, RunError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def trial(tmp_path):
    recipe = Recipe.load("sft_tiny").with_changes({"tracking.wandb": "offline"})
    directory = create(recipe, tmp_path)
    directory.write_status(state="stopped")
    return directory


def test_chips_are_read_once():
    (chip,) = json.loads(run(commands.chips, "read", "--accelerator", "cpu", "--json"))
    assert chip["index"] == 0 and chip["total_mib"] > chip["used_mib"] > 0
    with pytest.raises(RunError, match="expected auto, cpu, cuda, npu"):
        run(commands.chips, "read", "--accelerator", "tpu")


def test_a_missing_driver_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ASCENT_NPU_EXPORTER", "off")
    with pytest.raises(RunError, match=r"npu chips cannot be read on this machine .*npu-smi"):
        run(commands.chips, "read", "--accelerator", "npu")


def test_the_cost_is_printed():
    found = json.loads(
        run(commands.chips, "cost", "--accelerator", "cpu", "--samples", "2", "--interval", "5", "--json")
    )
    assert found["interval_s"] == 5.0 and found["cpu_ms"] > 0 and 0 < found["share"] < 1
    assert "of the interpreter" in run(commands.chips, "cost", "--accelerator", "cpu", "--samples", "2")


def test_energy_and_energy_a_token(trial, tmp_path):
    for second in range(0, 3601, 2):
        row = {"time": float(second), "chip/power_total": 500.0, "chips": [{"index": 0, "power": 500.0}]}
        jsonl.append(trial.path / "chips" / "node-0.jsonl", row)
    jsonl.append(trial.path / "metrics.jsonl", {"step": 1, "time": 3600.0, "train/num_tokens": 900_000.0})
    found = json.loads(run(commands.chips, "energy", "last", "--runs", str(tmp_path), "--json"))
    assert found["kwh"] == pytest.approx(0.5) and found["joules_per_token"] == pytest.approx(2.0)
    assert "0.5 kWh" in run(commands.chips, "energy", "last", "--runs", str(tmp_path))


def test_energy_that_nobody_measured_is_null(trial, tmp_path):
    found = json.loads(run(commands.chips, "energy", "last", "--runs", str(tmp_path), "--json"))
    assert found["kwh"] is None and found["joules_per_token"] is None


def offline(directory, start="20260101_000001"):
    folder = directory.path / "wandb" / f"offline-run-{start}-aaaa"
    folder.mkdir(parents=True)
    (folder / "run-aaaa.wandb").write_bytes(b"x" * 10)


def test_syncing_needs_runs_and_a_server(trial, tmp_path):
    root = ("--runs", str(tmp_path))
    with pytest.raises(RunError, match="name some, or give --all"):
        run(commands.wandb, "sync", *root)
    with pytest.raises(RunError, match="no offline W&B data"):
        run(commands.wandb, "sync", "last", *root)
    with pytest.raises(RunError, match=r"No run in .* has offline W&B data"):
        run(commands.wandb, "sync", "--all", *root)
    offline(trial)
    with pytest.raises(RunError, match="nothing leaves this machine unasked"):
        run(commands.wandb, "sync", "last", *root)
    with pytest.raises(RunError, match="nothing leaves this machine unasked"):
        run(commands.wandb, "sync", "--all", *root, "--dry-run")


def test_a_dry_run_says_what_would_go_and_needs_neither_key_nor_network(trial, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    offline(trial)
    words = ("sync", "--all", "--url", "http://127.0.0.1:11", "--runs", str(tmp_path), "--dry-run", "--json")
    (row,) = json.loads(run(commands.wandb, *words))
    assert row == {
        "run": trial.name,
        "piece": "offline-run-20260101_000001-aaaa",
        "bytes": 10,
        "state": "to upload",
    }


def test_a_recipes_own_server_is_asked_for(trial, tmp_path, monkeypatch):
    trial.replace_recipe(trial.recipe.with_changes({"tracking.base_url": "http://127.0.0.1:11"}))
    offline(trial)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(RunError, match=r"http://127.0.0.1:11 does not answer"):
        run(commands.wandb, "sync", trial.name, "--runs", str(tmp_path))


def test_reading_back_fails_where_the_numbers_differ(trial, tmp_path, monkeypatch):
    offline(trial)
    jsonl.append(
        trial.path / "metrics.jsonl", {"step": 1, "time": 1.0, "train/global_step": 1.0, "train/loss": 2.0}
    )
    loss = [2.0]
    item = lambda: {"_step": 0, "train/global_step": 1, "train/loss": loss[0]}  # noqa: E731
    monkeypatch.setattr(
        wandb_reader, "records", lambda piece: [{"type": "history", "history": {"item": item()}}]
    )
    found = json.loads(run(commands.wandb, "read", "last", "--runs", str(tmp_path), "--json"))
    assert found["equal"] and found["values"] == 2
    loss[0] = 2.5
    with pytest.raises(RunError, match="differ in 1 places"):
        run(commands.wandb, "read", "last", "--runs", str(tmp_path))


def test_the_verbs_start_without_torch_and_wandb():
    code = "import sys; sys.argv = ['lab', 'wandb', '--help']\nfrom lab_utils.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass\n"
    code += "print([m for m in ('torch', 'wandb', 'pandas', 'colossalai') if m in sys.modules])"
    kept = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept)
    assert done.stdout.splitlines()[-1] == "[]" and "workspace" in done.stdout and "sync" in done.stdout
