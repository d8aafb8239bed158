"""What holds for every launcher: one more file in the folder is tested by these, too."""

import inspect
import os
import subprocess

import pytest

from lab_utils.errors import RecipeError
from lab_utils.launchers import _base
from lab_utils.launchers._base import Launcher, get_launcher
from lab_utils.registry import members
from lab_utils.runs.states import JobState

NAMES = members(_base.MEMBERS)
FUNCTIONS = ("render", "submit", "status", "stop", "logs")


def test_there_is_a_local_launcher():
    assert "local" in NAMES


@pytest.fixture(params=NAMES)
def launcher(request):
    return get_launcher(request.param)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_has_the_functions_of_the_protocol(launcher, function):
    wanted = list(inspect.signature(getattr(Launcher, function)).parameters.values())[1:]
    found = list(inspect.signature(getattr(launcher, function)).parameters.values())
    assert [(p.name, p.default) for p in found[: len(wanted)]] == [(p.name, p.default) for p in wanted]


def test_rendering_is_a_plain_script_that_says_all_and_does_nothing(launcher, run_dir, recipe):
    before = sorted(p.name for p in run_dir.path.rglob("*"))
    script = launcher.render(run_dir, recipe)
    assert script == launcher.render(run_dir, recipe)
    assert sorted(p.name for p in run_dir.path.rglob("*")) == before and run_dir.status["state"] == "created"
    assert script.startswith("#!") and str(run_dir.path) in script and run_dir.name in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_job_that_was_never_submitted_is_not_running(launcher, run_dir):
    assert launcher.status(run_dir) in (JobState.GONE, JobState.UNKNOWN)


def test_stopping_leaves_the_request_in_the_run_directory(launcher, run_dir):
    launcher.stop(run_dir, checkpoint=True)
    assert run_dir.control["action"] == "checkpoint_and_stop"
    launcher.stop(run_dir, checkpoint=False)
    assert run_dir.control["action"] == "stop"


def test_logs_are_the_ends_of_files_and_empty_without_any(launcher, run_dir):
    assert launcher.logs(run_dir) == ""
    (run_dir.logs / "rank-10.log").write_text("ten\n")
    (run_dir.logs / "rank-2.log").write_text("".join(f"line {i}\n" for i in range(1000)))
    text = launcher.logs(run_dir, 3)
    assert text.splitlines() == [
        "==> rank-2.log <==",
        "line 997",
        "line 998",
        "line 999",
        "==> rank-10.log <==",
        "ten",
    ]
    assert launcher.logs(run_dir, 1, rank=10) == "ten"


def test_an_unknown_launcher_is_answered_with_the_known_ones():
    with pytest.raises(RecipeError, match="local"):
        get_launcher("slurmm")


# -- local ---------------------------------------------------------------------------------------------


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
