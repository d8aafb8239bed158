"""Real jobs: torchrun, the worker, the recipe's own data and model; then audit and export of what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab_utils.engine import checkpoint
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory, create

sys.path.insert(0, str(Path(__file__).parent))
from small_v4 import write_source

pytestmark = pytest.mark.slow  # real processes: minutes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_source(tmp_path_factory.mktemp("source") / "small", index_topk=2)


def make_run(root: Path, source: str, **changes: Any) -> RunDirectory:
    base = {
        "name": "job",
        "model": {"source": source, "indexer_loss": 0.01},
        "data": {
            "train": [{"manifest": "ascent-tasks-sft"}],
            "validation": [{"manifest": "ascent-tasks-sft", "split": "validation", "weight": 0.05}],
            "row_tokens": 512,
        },
        "optim": {"lr": 3e-3},
        "schedule": {"steps": 4, "batch_tokens": 2048, "warmup_steps": 1, "save_every": 2},
        "cluster": {"accelerator": "cpu", "nproc": 2, "threads": 1},
        "tracking": {"wandb": "disabled"},
    }
    return create(Recipe.parse(base).with_changes(changes), root)


def start(run: RunDirectory, ranks: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["ASCENT_CACHE"] = str(run.path.parent / "cache")
    return subprocess.Popen(
        [*command, "-m", "lab_utils.engine.worker", str(run.path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(job: subprocess.Popen) -> tuple[int, str]:
    output, _ = job.communicate(timeout=300)
    return job.returncode, output


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, source: str) -> RunDirectory:
    """A run whose second rank was killed on the way, and that was then resumed to its end."""
    run = make_run(
        tmp_path_factory.mktemp("runs"), source, **{"schedule.steps": 400, "model.dtype": "bfloat16"}
    )
    job = start(run, 2)
    deadline = time.monotonic() + 200
    while not run.checkpoints() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert job.poll() is None, job.communicate()[0][-6000:]
    workers = psutil.Process(job.pid).children()
    victim = next(w for w in workers if w.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    code, output = finish(job)
    assert code != 0, output[-3000:]
    status = run.status
    (run.path / "killed.json").write_text(
        json.dumps(
            {
                "status": status,
                "code": code,
                "checkpoint": checkpoint.newest(run.path / "checkpoints")[0].name,
            }
        )
    )
    # The end is moved nearer, so that the test need not train for long; nothing else of the recipe changes.
    reached = checkpoint.read_state(run.checkpoints()[-1])["step"]
    shorter = run.recipe.with_changes({"schedule.steps": reached + 3})
    (run.path / "recipe.yaml").write_text(shorter.to_yaml())
    code, output = finish(start(run, 2))
    assert code == 0, output[-3000:]
    return run


def test_a_dead_rank_ends_the_others_and_leaves_a_whole_checkpoint(done: RunDirectory) -> None:
    killed = json.loads((done.path / "killed.json").read_text())
    assert killed["code"] != 0 and killed["checkpoint"]
    # A survivor that torchrun ends before it can write leaves that to the supervisor (tests/runs/test_lifecycle.py).
    if killed["status"]["state"] != "running":
        assert killed["status"]["state"] == "failed"
        assert "another rank" in killed["status"]["error"] and "resume" in killed["status"]["error"]


def test_a_killed_run_is_resumed_to_its_end(done: RunDirectory) -> None:
    assert done.status["state"] == "succeeded"
    assert done.status["step"] == done.recipe.schedule.steps
    assert any(row["kind"] == "resumed" for row in done.rows("events.jsonl"))


def test_a_run_that_ends_leaves_its_card_and_an_audit(done: RunDirectory) -> None:
    card = json.loads((done.path / "card.json").read_text())
    assert card["state"] == "succeeded" and card["steps"] == done.recipe.schedule.steps
    assert card["audit"]["every_weight_moved"] is True
    assert len(card["attempts"]) == 2 and card["wall_clock_s"] > 0
    assert card["hardware"]["kind"] == "cpu" and card["energy_kwh"] is None and card["mfu"] > 0
    assert card["data"]["sources"][0]["tokens_per_pass"] > 0
    assert (done.path / "card.html").is_file() and (done.path / "card.md").is_file()


def test_every_tensor_is_changed_the_indexer_included(
    done: RunDirectory, capsys: pytest.CaptureFixture
) -> None:
    from lab_utils.engine.commands import audit

    audit(str(done.path), json=True, all_tensors=False)
    report = json.loads(capsys.readouterr().out)
    assert report["unchanged"] == [] and report["changed"] == report["tensors"] > 50
    assert report["indexer_changed"] is True
    assert all(row["relative_change"] > 0 for row in report["by_tensor"])
    assert any("e_score_correction_bias" in row["name"] for row in report["buffers"])
    audit(str(done.path), json=False, all_tensors=False)
    assert "every tensor changed" in capsys.readouterr().out


def test_the_export_generates_in_transformers(done: RunDirectory, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lab_utils.engine.export import export
    from lab_utils.errors import CheckpointError

    report = export(done, tmp_path / "out")
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= set(
        report["files"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id is not None
    ids = tokenizer("2 + 2 =", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > ids.shape[1]
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export(done, tmp_path / "out")
    assert not list(tmp_path.glob(".*partial"))


def test_another_causal_lm_is_trained_audited_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from lab_utils.engine.commands import audit
    from lab_utils.engine.export import export

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(vocab_size=2048, num_attention_heads=4, num_key_value_heads=2, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen3")
    run = make_run(tmp_path, str(tmp_path / "qwen3"), **{"schedule.steps": 8, "schedule.save_every": 8})
    code, output = finish(start(run, 2))
    assert code == 0, output[-3000:]
    losses = [row["train/loss"] for row in run.rows("metrics.jsonl") if "train/loss" in row]
    assert losses[-1] < losses[0]
    audit(str(run.path), json=True, all_tensors=False)
    report = json.loads(capsys.readouterr().out)
    assert report["unchanged"] == [] and report["indexer_changed"] is None
    export(run, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "qwen3"


def test_ranks_that_do_not_divide_the_batch_get_one_sentence(tmp_path: Path, source: str) -> None:
    run = make_run(tmp_path, source, **{"schedule.batch_tokens": 512})
    code, output = finish(start(run, 2))
    assert code != 0
    assert run.status["state"] == "failed"
    assert "cannot be shared evenly by 2 ranks" in run.status["error"]
    assert 'File "' not in output.split("ChildFailedError")[0].split("Traceback (most recent call last)")[0]
    assert "lab_utils/engine/engine.py" not in output, "no traceback of ours"


def test_a_folder_that_is_no_run_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from lab_utils.engine.worker import main

    assert main([str(tmp_path)]) != 0
    assert "recipe.yaml" in capsys.readouterr().err
