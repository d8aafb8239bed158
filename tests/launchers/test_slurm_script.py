"""The sbatch script: its directives, what a node is given, and what it is refused."""

import os
import subprocess

import pytest

from lab_utils.errors import RecipeError
from lab_utils.launchers import slurm


@pytest.fixture
def recipe(recipe):
    return recipe.with_changes({"cluster.launcher": "slurm", "cluster.nodes": 2, "cluster.nproc": 16})


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def node(script: str, **environment: str) -> dict[str, str]:
    """Variables of a node's torchrun: the script itself, with ``env`` in its place."""
    before, _, _ = script.partition("# Keeps the scheduler's signals")
    done = subprocess.run(
        ["bash", "-s", "node"],
        input=before + "\nenv -0\n",
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)


def test_all_that_slurm_is_asked_stands_at_the_head(run_dir, recipe):
    options = {
        "partition": "a3",
        "account": "lab",
        "qos": "high",
        "reservation": "night",
        "constraint": "a3&hccs",
        "exclude": "n[3,7]",
        "gres": "npu:16",
        "hours": 25.5,
        "cpus": 320,
        "memory": "900G",
        "grace_seconds": 600,
        "sbatch": {"comment": "two words", "contiguous": True, "switches": 1},
    }
    found = directives(slurm.render(run_dir, recipe.with_changes({"cluster.options": options})))
    assert found == [
        f"--job-name={run_dir.name}",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gres=npu:16",
        "--partition=a3",
        "--account=lab",
        "--qos=high",
        "--reservation=night",
        "--constraint=a3&hccs",
        "--exclude=n[3,7]",
        "--time=1-01:30:00",
        "--exclusive",
        "--cpus-per-task=320",
        "--mem=900G",
        f'--output="{run_dir.path}/logs/launcher.log"',
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@600",
        '--comment="two words"',
        "--contiguous",
        "--switches=1",
    ]


def test_nothing_is_asked_for_that_the_site_decides(run_dir, recipe):
    found = directives(slurm.render(run_dir, recipe.with_changes({"cluster.options": {"requeue": False}})))
    assert [line.partition("=")[0] for line in found] == [
        *("--job-name", "--nodes", "--ntasks-per-node", "--exclusive", "--mem", "--output", "--open-mode"),
        *("--no-requeue", "--signal"),
    ]
    shared = slurm.render(run_dir, recipe.with_changes({"cluster.options": {"exclusive": False}}))
    assert not {"--exclusive", "--mem=0"} & set(directives(shared))


def test_a_percent_in_the_path_is_no_pattern_of_slurms(tmp_path, recipe):
    from lab_utils.runs.directory import RunDirectory

    (tmp_path / "100%j").mkdir()
    script = slurm.render(RunDirectory(tmp_path / "100%j"), recipe)
    assert f'--output="{tmp_path}/100%%j/logs/launcher.log"' in directives(script)


def test_ranks_of_npus_get_the_variables_that_a_large_job_needs(run_dir, recipe):
    npu = recipe.with_changes({"cluster.accelerator": "npu", "cluster.options": {"interface": "bond0"}})
    found = node(slurm.render(run_dir, npu), RANK_TABLE_FILE="/old.json", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert found["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1", "the login node's 0 would keep torch_npu away"
    assert (
        int(found["HCCL_EVENT_TIMEOUT"])
        > int(found["HCCL_EXEC_TIMEOUT"])
        > int(found["HCCL_CONNECT_TIMEOUT"])
    )
    assert found["HCCL_DETERMINISTIC"] == "true" and "RANK_TABLE_FILE" not in found
    assert found["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert found["ASCEND_PROCESS_LOG_PATH"] == f"{run_dir.path}/logs/ascend"
    assert found["HCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "bond0"
    other = node(slurm.render(run_dir, npu), PYTORCH_ALLOC_CONF="page_size:1g", HCCL_CONNECT_TIMEOUT="3600")
    assert "PYTORCH_NPU_ALLOC_CONF" not in other and other["HCCL_CONNECT_TIMEOUT"] == "3600"


def test_other_devices_get_none_of_them(run_dir, recipe):
    found = node(slurm.render(run_dir, recipe))
    assert found["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0" and not [
        key for key in found if key.startswith("HCCL")
    ]
    assert found["WANDB_MODE"] == "offline" and found["HF_HUB_OFFLINE"] == "1"
    for key in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        assert found[key].startswith(str(run_dir.path)), key


@pytest.mark.parametrize(
    "accelerator, gres, kind", [("auto", "npu:8", "1"), ("auto", "gpu:8", "0"), ("cpu", None, "0")]
)
def test_the_kind_of_chip_is_told_from_the_resource_not_from_the_login_node(
    run_dir, recipe, monkeypatch, accelerator, gres, kind
):
    monkeypatch.delenv("ASCENT_ACCELERATOR", raising=False)
    changed = recipe.with_changes({"cluster.accelerator": accelerator, "cluster.options": {"gres": gres}})
    assert f"TORCH_DEVICE_BACKEND_AUTOLOAD={kind}" in slurm.render(run_dir, changed)


def test_cores_are_shared_among_the_ranks_of_a_node_however_the_job_was_launched(run_dir, recipe):
    one = recipe.with_changes({"cluster.nproc": 1})
    cores = len(os.sched_getaffinity(0))
    assert node(slurm.render(run_dir, one), OMP_NUM_THREADS="1")["OMP_NUM_THREADS"] == str(cores)
    assert node(slurm.render(run_dir, recipe))["OMP_NUM_THREADS"] == str(max(1, cores // 16))
    fixed = recipe.with_changes({"cluster.threads": 3})
    assert node(slurm.render(run_dir, fixed))["OMP_NUM_THREADS"] == "3"


def test_lines_of_the_site_come_first_and_its_variables_win(run_dir, recipe):
    options = {
        "setup": ["export SITE=here OMP_NUM_THREADS=99", 'echo "$UNSET_HERE"'],
        "environment": {"OMP_NUM_THREADS": 2, "DEBUG": True},
        "python": "/opt/npu/bin/python",
    }
    script = slurm.render(run_dir, recipe.with_changes({"cluster.options": options}))
    found = node(script)
    assert found["SITE"].endswith("here") and found["OMP_NUM_THREADS"] == "2" and found["DEBUG"] == "true"
    assert "python=/opt/npu/bin/python" in script


def test_cann_is_set_up_on_the_node_and_missed_where_it_was_named(run_dir, recipe, tmp_path):
    script = tmp_path / "set_env.sh"
    script.write_text("export ASCEND_HOME=$NOT_SET/found\n")
    npu = recipe.with_changes({"cluster.accelerator": "npu", "cluster.options": {"cann": str(script)}})
    assert node(slurm.render(run_dir, npu))["ASCEND_HOME"] == "/found"
    script.unlink()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        node(slurm.render(run_dir, npu))
    assert "cluster.options.cann" in caught.value.stderr


def test_a_node_that_does_not_see_the_run_ends_with_one_sentence(run_dir, recipe):
    script = slurm.render(run_dir, recipe).replace(f"run='{run_dir.path}'", "run=/not/shared")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        node(script)
    assert "does not see /not/shared" in caught.value.stderr and "ASCENT_RUNS" in caught.value.stderr


@pytest.mark.parametrize(
    "options, words",
    [
        ({"partition": "a; rm -rf"}, "cluster.options.partition: 'a; rm -rf' is not of its form"),
        ({"hours": -1}, "cluster.options.hours"),
        ({"grace_seconds": 5}, "greater than or equal to 30"),
        ({"sbatch": {"nodes": 3}}, "'nodes' is set by the script itself"),
        ({"sbatch": {"-J": "x"}}, "no long key of sbatch"),
        ({"environment": {"A-B": "x"}}, "no name of a variable"),
        ({"memory": "lots"}, "cluster.options.memory"),
    ],
)
def test_settings_that_make_no_script_are_refused(run_dir, recipe, options, words):
    with pytest.raises(RecipeError) as caught:
        slurm.render(run_dir, recipe.with_changes({"cluster.options": options}))
    assert words in str(caught.value) and "\n" not in str(caught.value)
