"""The local launcher's script: what its ranks are given."""

import os
import subprocess

from lab_utils.launchers._base import get_launcher


def exported(script: str, **environment: str) -> dict[str, str]:
    """The variables that a script would give to its job."""
    lines = [line for line in script.splitlines() if not line.startswith("exec ")]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines) + "\nenv -0"],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)


def test_the_job_is_offline_and_writes_below_the_run_only(run_dir, recipe):
    found = exported(get_launcher("local").render(run_dir, recipe))
    assert found["WANDB_MODE"] == "offline" and found["HF_HUB_OFFLINE"] == "1"
    assert found["WANDB_ERROR_REPORTING"] == "false" and found["WANDB_BASE_URL"].startswith(
        "http://127.0.0.1"
    )
    for key in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        assert found[key].startswith(str(run_dir.path)), key


def test_what_the_user_has_set_wins_where_it_is_a_matter_of_taste(run_dir, recipe):
    script = get_launcher("local").render(run_dir, recipe)
    assert exported(script, HF_HUB_OFFLINE="0")["HF_HUB_OFFLINE"] == "0"
    assert exported(script, WANDB_MODE="online")["WANDB_MODE"] == "offline", "the recipe says how W&B runs"


def test_cores_are_shared_among_the_ranks_unless_the_recipe_says(run_dir, recipe, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    render = get_launcher("local").render
    assert exported(render(run_dir, recipe))["OMP_NUM_THREADS"] == "6"
    fixed = recipe.with_changes({"cluster.threads": 3})
    assert exported(render(run_dir, fixed))["OMP_NUM_THREADS"] == "3"
    crowded = recipe.with_changes({"cluster.nproc": 16})
    assert exported(render(run_dir, crowded))["OMP_NUM_THREADS"] == "1"


def test_torch_npu_is_loaded_by_itself_only_where_there_is_an_npu(run_dir, recipe):
    found = exported(get_launcher("local").render(run_dir, recipe))
    assert found["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
