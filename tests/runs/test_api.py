"""What a reader concludes from a run's files, and what is looked at before a run starts."""

import hashlib
import json
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml

from lab_utils.errors import DataError, LabError, LayoutError, RecipeError, RunError
from lab_utils.runs import api, checks, provenance
from lab_utils.runs.api import Run, attach, launch, list_runs
from lab_utils.runs.directory import create
from lab_utils.runs.steps import merge_steps


def log(run, *rows):
    for row in rows:
        run.append("metrics.jsonl", {"time": 1.0, **row})


def test_metrics_are_a_table_by_step(tmp_path, recipe):
    run = create(recipe, tmp_path)
    log(run, {"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}, {"step": 2, "eval/loss": 1.5})
    frame = Run(run).metrics()
    assert frame.index.name == "step" and list(frame.index) == [1, 2]
    assert frame["train/loss"].tolist() == [2.0, 1.0] and frame["eval/loss"][2] == 1.5


def test_a_resumed_run_replaces_what_an_abandoned_attempt_had_logged(tmp_path, recipe):
    run = create(recipe, tmp_path)
    log(run, *({"step": s, "train/loss": 10.0 + s} for s in range(1, 16)))
    log(run, *({"step": s, "train/loss": 20.0 + s} for s in range(11, 14)))
    frame = Run(run).metrics()
    assert list(frame.index) == list(range(1, 14))
    assert frame["train/loss"][10] == 20.0 and frame["train/loss"][11] == 31.0


def test_torn_and_foreign_lines_are_passed_over(tmp_path, recipe):
    run = create(recipe, tmp_path)
    log(run, {"step": 1, "train/loss": "NaN"})
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('[1]\nnonsense\n{"step": "x"}\n{"step": 2, "train/lo')
    frame = Run(run).metrics()
    assert list(frame.index) == [1] and frame["train/loss"].isna().all()


def test_a_run_that_has_logged_nothing_has_an_empty_table(tmp_path, recipe):
    assert len(Run(create(recipe, tmp_path)).metrics()) == 0
    assert merge_steps([]) == {}


def test_a_run_without_heartbeat_and_job_is_lost_and_says_how_to_go_on(tmp_path, recipe):
    run = create(recipe, tmp_path)
    run.write_status(
        state="running", launcher="local", host=socket.gethostname(), job="here:999999999", step=7
    )
    assert Run(run).state == "running"
    run.write_status(heartbeat=time.time() - 3600)
    status = Run(run).status
    assert status["state"] == "lost" and f"lab runs resume {run.name}" in status["error"]
    assert run.status["state"] == "running", "concluded on reading, not written"
    with pytest.raises(RunError, match="was lost"):
        Run(run).wait(progress=False)


def test_a_lost_run_whose_rank_left_its_reason_has_failed(tmp_path, recipe):
    run = create(recipe, tmp_path)
    run.write_status(
        state="running", launcher="local", host=socket.gethostname(), heartbeat=time.time() - 3600
    )
    (run.logs / "rank-1.error.json").write_text(
        json.dumps({"rank": 1, "time": time.time(), "error": "No more."})
    )
    status = Run(run).status
    assert (status["state"], status["error"], status["failed_rank"]) == ("failed", "No more.", 1)


def test_a_job_number_that_another_program_has_now_is_not_the_job(tmp_path, recipe):
    run = create(recipe, tmp_path)
    with subprocess.Popen(["sleep", "30"]) as other:
        run.write_status(
            state="running",
            launcher="local",
            host=socket.gethostname(),
            job=f"here:{other.pid}",
            pid=other.pid,
            heartbeat=time.time() - 3600,
        )
        assert Run(run).state == "lost"
        other.kill()


def test_a_summary_has_the_keys_that_scripts_lean_on(tmp_path, recipe):
    run = create(recipe, tmp_path)
    log(run, {"step": 1, "train/loss": 2.0, "eval/loss": 3.0}, {"step": 2, "train/loss": 1.0})
    summary = Run(run).summary()
    assert summary["run"] == run.name and summary["path"] == str(run.path) and summary["state"] == "created"
    assert summary["step"] == 0 and summary["metrics"] == {"train/loss": 1.0, "eval/loss": 3.0}
    assert json.loads(json.dumps(summary)) == summary


def test_attach_and_list_find_runs_of_other_processes(tmp_path, recipe):
    first, second = create(recipe, tmp_path), create(recipe, tmp_path)
    assert attach("last", tmp_path).name == second.name
    assert [run.name for run in list_runs(tmp_path)] == [second.name, first.name]


def test_steering_a_run_that_has_ended_is_one_sentence(tmp_path, recipe):
    run = create(recipe, tmp_path)
    run.write_status(state="running")
    run.write_status(state="succeeded", step=20)
    with pytest.raises(RunError, match="has ended already"):
        Run(run).stop()
    with pytest.raises(RunError, match="has done all its 20 steps"):
        Run(run).resume()


# -- before a start ------------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path, recipe):
    """The recipe over a set of one small file, which the test may damage."""
    messages = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    file = tmp_path / "data" / "train.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps({"messages": messages}) + "\n")
    content = file.read_bytes()
    entry = {
        "path": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "rows": 1,
    }
    tree = {
        "name": "own",
        "version": "1",
        "licence": "CC0-1.0",
        "provenance": "made by a test",
        "format": "messages",
        "splits": {"train": {"kind": "file", "files": [entry]}},
    }
    (file.parent / "own.yaml").write_text(yaml.safe_dump(tree))
    recipe = recipe.with_changes({"data.train.0.manifest": str(file.parent / "own.yaml")})
    checks.check_data(recipe)
    return recipe, file


def refused(recipe, root, kind) -> str:
    with pytest.raises(kind) as caught:
        launch(recipe, root=root)
    assert not root.exists() or list(root.iterdir()) == [], "nothing was made"
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?"))
    return text


def test_a_layout_that_does_not_divide_is_refused(tmp_path, recipe):
    assert "cluster.nproc" in refused(
        recipe.with_changes({"cluster.nproc": 3}), tmp_path / "runs", LayoutError
    )


def test_damaged_data_is_refused_before_anything_starts(tmp_path, own_data):
    recipe, file = own_data
    file.write_text(file.read_text().replace("5", "6"))
    assert "train.jsonl" in refused(recipe, tmp_path / "runs", DataError)


def test_missing_data_is_refused_before_anything_starts(tmp_path, own_data):
    recipe, file = own_data
    file.unlink()
    assert "train.jsonl" in refused(recipe, tmp_path / "runs", DataError)


def test_an_unknown_split_or_manifest_is_refused(tmp_path, recipe):
    assert "trian" in refused(
        recipe.with_changes({"data.train.0.split": "trian"}), tmp_path / "runs", DataError
    )
    changed = recipe.with_changes({"data.train.0.manifest": "ascent-tasks-sftt"})
    assert "ascent-tasks-sft" in refused(changed, tmp_path / "runs", DataError)


def test_a_full_disk_is_refused_with_both_numbers(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**27))
    text = refused(recipe, tmp_path / "runs", RunError)
    assert "0.12 GiB free" in text and "ASCENT_RUNS" in text


def test_the_room_for_checkpoints_is_counted_from_the_weights(tmp_path, recipe):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000, 50], "data_offsets": [0, 200000]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    recipe = recipe.with_changes({"model.source": str(tmp_path), "schedule.keep_last": 3})
    assert checks.disk_needed(recipe) == (
        checks.SMALL_FILES + 3 * 600_000,
        600_000,
    )  # 2 saves, 1 being written
    bf16 = recipe.with_changes({"model.dtype": "bfloat16"})
    assert checks.disk_needed(bf16)[1] == 700_000


@pytest.mark.parametrize("chips, words", [(1, "cluster.nproc=1"), (0, "no npu device is visible")])
def test_missing_devices_are_refused(tmp_path, recipe, monkeypatch, chips, words):
    monkeypatch.delenv("ASCENT_ACCELERATOR", raising=False)
    monkeypatch.setattr("lab_utils.telemetry.chips.count", lambda kind: chips)
    asked = recipe.with_changes({"cluster.accelerator": "npu"})
    assert words in refused(asked, tmp_path / "runs", LayoutError)


def test_the_device_kind_is_told_from_drivers_and_can_be_forced(recipe, monkeypatch):
    monkeypatch.delenv("ASCENT_ACCELERATOR", raising=False)
    auto = recipe.with_changes({"cluster.accelerator": "auto"})
    monkeypatch.setattr("lab_utils.telemetry.chips.count", lambda kind: 8 if kind == "cuda" else 0)
    assert checks.device_kind(auto) == "cuda" and checks.device_kind(recipe) == "cpu"
    monkeypatch.setattr("lab_utils.telemetry.chips.count", lambda kind: 0)
    assert checks.device_kind(auto) == "cpu"
    monkeypatch.setenv("ASCENT_ACCELERATOR", "npu")
    assert checks.device_kind(auto) == "npu"
    monkeypatch.setenv("ASCENT_ACCELERATOR", "npuu")
    with pytest.raises(LayoutError, match="did you mean 'npu'"):
        checks.device_kind(auto)


def test_an_unknown_launcher_is_refused(tmp_path, recipe):
    assert "local" in refused(
        recipe.with_changes({"cluster.launcher": "slurmm"}), tmp_path / "runs", RecipeError
    )


def test_provenance_names_code_data_packages_layout_and_notebook(tmp_path, recipe, monkeypatch):
    monkeypatch.setenv("ASCENT_NOTEBOOK", "/somewhere/10_sft.ipynb")
    found = provenance.write(tmp_path, recipe)
    assert found == json.loads((tmp_path / "provenance.json").read_text())
    assert found["notebook"] == "/somewhere/10_sft.ipynb" and found["recipe_hash"] == recipe.hash
    assert found["layout"] == {"ranks": 2, "dp": 2, "micro_rows": 2, "accumulation": 1}
    assert "torch" in found["packages"]
    hashes = found["data"]["ascent-tasks-sft"]["sha256"]
    assert hashes and all(len(digest) == 64 for digest in hashes.values())
    again = provenance.write(tmp_path, recipe)
    assert (
        again["created"] == found["created"]
        and len(again["resumed"]) == 1
        and "packages" not in again["resumed"][0]
    )


def test_a_dirty_clone_is_stored_with_its_difference(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    (tmp_path / "file.py").write_text("a = 1\n")
    assert provenance.git(tmp_path) == {}
    git("init", "-q")
    git("add", "file.py")
    git("commit", "-q", "-m", "x")
    assert provenance.git(tmp_path)["dirty"] is False
    (tmp_path / "file.py").write_text("a = 2\n")
    (tmp_path / "new.py").write_text("")
    found = provenance.git(tmp_path)
    assert found["dirty"] and "+a = 2" in found["diff"] and found["untracked"] == ["new.py"]


def test_following_runs_imports_no_torch():
    code = "import lab_utils.runs.api, lab_utils.launchers.local, lab_utils.launchers._supervisor, sys; "
    code += "from lab_utils.recipe import Recipe; from lab_utils.runs.checks import preflight; "
    code += "preflight(Recipe.load('sft_tiny'), __import__('pathlib').Path('.')); "
    code += "print([m for m in ('torch', 'colossalai', 'pandas', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_is_resumed_under_another_layout_but_stays_what_it_computes(tmp_path, recipe, monkeypatch):
    directory = create(recipe, tmp_path)
    directory.write_status(state="stopped", step=3)
    before = (directory.path / "recipe.yaml").stat().st_mtime_ns
    submitted = []
    monkeypatch.setattr(api, "preflight", lambda recipe, root: recipe.layout())
    monkeypatch.setattr(api.provenance, "write", lambda path, recipe: None)
    monkeypatch.setattr(api, "_submit", lambda directory, recipe: submitted.append(recipe))
    run = attach(directory.path)
    with pytest.raises(RunError, match=r"optim\.lr changes what .* computes"):
        run.resume({"optim.lr": 1e-5})
    with pytest.raises(LabError, match=r"parallel\.pp"):
        run.resume({"parallel.pp": 3})
    assert run.recipe == recipe and not submitted, "a refused resume leaves everything as it was"
    run.resume({"model.checkpointing": "full", "schedule.save_every": 7})
    assert submitted == [run.recipe]
    assert run.recipe.model.checkpointing == "full" and run.recipe.schedule.save_every == 7
    assert (directory.path / "recipe.yaml").stat().st_mtime_ns == before


def succeeded(recipe, root):
    run = create(recipe, root)
    for state in ("running", "succeeded"):
        run.write_status(state=state)
    for step in ("step-000010", "step-000020"):
        (run.path / "checkpoints" / step / "model").mkdir(parents=True)
        (run.path / "checkpoints" / step / "COMPLETE").touch()
    return Run(run)


def test_weights_are_those_of_the_newest_checkpoint(tmp_path, recipe):
    assert succeeded(recipe, tmp_path).weights == next(tmp_path.iterdir()) / "checkpoints/step-000020/model"
    with pytest.raises(RunError, match="has no checkpoint yet"):
        _ = Run(create(recipe, tmp_path)).weights


def test_a_finished_run_of_the_same_recipe_is_taken_again(tmp_path, recipe, monkeypatch):
    launched = []
    monkeypatch.setattr(api, "launch", lambda recipe, **options: launched.append((recipe, options)))
    done = succeeded(recipe, tmp_path)
    create(recipe.with_changes({"schedule.steps": 30}), tmp_path)  # newer, another recipe, and not done
    elsewhere = recipe.with_changes({"tracking.log_every": 5})
    assert api.finished(elsewhere, root=tmp_path).path == done.path and not launched
    other = recipe.with_changes({"optim.lr": 1e-4})
    api.finished(other, root=tmp_path)
    assert launched == [(other, {"root": tmp_path, "wait": True})]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.source": "/no/where"}, r"^model\.source: '/no/where' is no folder"),
        ({"model.source": "preset:tyni"}, r"^model\.source: there is no preset 'tyni'.*tiny"),
        (
            {"objective": {"kind": "distill", "teachers": [{"source": "base:huge"}]}},
            r"^objective\.teachers\.0\.source: no model 'huge' ships",
        ),
        (
            {"objective": {"kind": "preference", "reference_source": "gone"}},
            r"^objective\.reference_source: 'gone' is no folder",
        ),
    ],
)
def test_weights_that_are_not_there_are_refused_before_the_start(recipe, changes, says):
    with pytest.raises(RecipeError, match=says):
        checks.check_sources(recipe.with_changes(changes))
    checks.check_sources(recipe.with_changes({"model.source": "base:tiny"}))


def test_a_layout_that_is_left_to_the_planner_is_chosen_before_the_run_is_made(tmp_path, recipe, monkeypatch):
    """The run directory holds the layout itself: what is resumed or compared later is what ran."""
    from lab_utils.planner.auto import chosen
    from lab_utils.planner.own import machines

    profile = tmp_path / "cores.yaml"
    profile.write_text(yaml.safe_dump(machines()[0]["cluster"]))
    started = []
    monkeypatch.setattr(api, "_submit", lambda directory, recipe: started.append(recipe))
    monkeypatch.setattr(api, "preflight", lambda recipe, root: recipe.layout())
    monkeypatch.setattr(provenance, "data_hashes", lambda recipe: {})
    open_ = recipe.with_changes({"parallel": "auto", "cluster.profile": str(profile)})
    run = launch(open_, root=tmp_path)
    assert started == [run.recipe] and run.recipe == chosen(open_) and not run.recipe.parallel.auto
    assert run.recipe.layout()[0] in (1, 2) and run.recipe.parallel.dp is not None

    run.directory.write_status(state="failed", step=5)
    run.resume({"parallel": "auto"})
    assert started[-1] == run.recipe and not run.recipe.parallel.auto
