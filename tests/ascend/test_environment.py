"""Variables of ranks on NPUs: their values for a recipe, the lines of scripts, and what is wrong with a node's."""

import pytest

from lab_utils.ascend import environment
from lab_utils.ascend.checks import environment as check
from lab_utils.launchers import local, slurm, volcano
from lab_utils.launchers._base import get_launcher
from lab_utils.planner import memory
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory

LAUNCHERS = {"local": local, "slurm": slurm, "volcano": volcano}


def recipe(**changes):
    return Recipe.load("sft_tiny").with_changes(
        {"cluster.accelerator": "npu", "cluster.nproc": 16, **changes}
    )


def values(found: Recipe) -> dict[str, str | None]:
    return {v.name: v.value for v in environment.variables(found, "/logs")}


def test_every_variable_has_a_reason_and_a_source_and_none_comes_twice():
    found = environment.variables(recipe(), "/logs")
    assert len({v.name for v in found}) == len(found) > 10
    assert all(len(v.reason) > 20 and v.source and not v.reason.endswith(".") for v in found)


@pytest.mark.parametrize("nodes, seconds", [(1, "1800"), (63, "1800"), (64, "3600"), (128, "3600")])
def test_a_thousand_ranks_wait_longer_for_one_another(nodes, seconds):
    many = recipe(**{"cluster.launcher": "slurm", "cluster.nodes": nodes, "schedule.batch_tokens": 2**21})
    assert values(many)["HCCL_CONNECT_TIMEOUT"] == seconds


def test_buffers_of_communicators_grow_with_the_micro_batch():
    base = {"model.source": "preset:pro", "model.dtype": "bfloat16", "schedule.micro_rows": 1}
    short = recipe(**base, **{"data.row_tokens": 4096, "schedule.batch_tokens": 2**20})
    long = recipe(**base, **{"data.row_tokens": 32768, "schedule.batch_tokens": 2**20})
    assert environment.buffer_mb(short) == memory.LEAST_BUFFER == 64  # 56 MB of hidden states
    assert environment.buffer_mb(long) == 448 == 32768 * 7168 * 2 / 2**20
    assert values(long)["HCCL_BUFFSIZE"] == "448"


def test_a_model_of_unknown_width_leaves_the_buffer_as_cann_has_it():
    assert "HCCL_BUFFSIZE" not in values(recipe(**{"model.source": "/nowhere"}))


def test_only_a_smoke_run_forbids_to_fall_back_to_the_cpu():
    smoke, real = recipe(**{"schedule.steps": 5}), recipe(**{"schedule.steps": 5000})
    assert values(smoke)["TORCH_NPU_FALLBACK_CPU_DISABLE"] == "1"
    assert "TORCH_NPU_FALLBACK_CPU_DISABLE" not in values(real)


@pytest.mark.parametrize(
    "launcher, options, expected",
    [
        ("slurm", {"profile": "ascend-910c"}, "AI_CPU"),
        ("slurm", {"profile": "ascend-910b"}, None),
        ("slurm", {}, None),
        ("volcano", {"image": "a/b:1", "accelerator_type": "module-a3-16"}, "AI_CPU"),
        ("volcano", {"image": "a/b:1", "accelerator_type": "module-910b-8"}, None),
    ],
)
def test_how_collectives_unfold_follows_the_product(launcher, options, expected):
    found = recipe(**{"cluster.launcher": launcher, "cluster.options": options})
    assert values(found).get("HCCL_OP_EXPANSION_MODE") == expected


@pytest.mark.parametrize("launcher", sorted(check.JOBS))
def test_every_launchers_script_gives_the_reason_above_the_line(tmp_path, launcher):
    npu = {"cluster.launcher": launcher, **check.JOBS[launcher], "schedule.batch_tokens": 2**21}
    found = recipe(**npu)
    script = check.rendered(launcher, found, tmp_path / launcher)
    lines = [line.strip() for line in script.splitlines()]
    for v in environment.variables(found, "/logs"):
        at = next(
            i for i, line in enumerate(lines) if f"export {v.name}=" in line or line == f"unset {v.name}"
        )
        assert lines[at - 1] == f"# {v.reason} [{v.source}]"


@pytest.mark.parametrize("launcher", sorted(check.JOBS))
def test_scripts_for_other_devices_set_none_of_it(tmp_path, launcher):
    options = {**check.JOBS[launcher], "cluster.accelerator": "cpu", "schedule.batch_tokens": 2**21}
    other = recipe(**{"cluster.launcher": launcher, **options})
    text = get_launcher(launcher).render(RunDirectory(tmp_path), other)
    assert "HCCL_" not in text and "PYTORCH_NPU_ALLOC_CONF" not in text


def test_what_a_user_has_set_stays_but_for_what_must_be_ours():
    import subprocess

    script = "\n".join([*environment.lines(environment.variables(recipe(), "/logs")), "env -0"])
    mine = {"HCCL_CONNECT_TIMEOUT": "7000", "PYTORCH_ALLOC_CONF": "page_size:1g", "RANK_TABLE_FILE": "/old"}
    done = subprocess.run(
        ["bash", "-euc", script],
        env={"PATH": "/usr/bin:/bin", **mine},
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)
    assert found["HCCL_CONNECT_TIMEOUT"] == "7000" and "PYTORCH_NPU_ALLOC_CONF" not in found
    assert "RANK_TABLE_FILE" not in found and found["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"
    assert environment.problems(found) == []


@pytest.mark.parametrize(
    "given, name, advice",
    [
        ({"RANK_TABLE_FILE": "/t.json"}, "RANK_TABLE_FILE", "unset"),
        ({"PYTORCH_ALLOC_CONF": "a", "PYTORCH_NPU_ALLOC_CONF": "b"}, "PYTORCH_ALLOC_CONF", "one of the two"),
        ({"HCCL_CONNECT_TIMEOUT": "60"}, "HCCL_CONNECT_TIMEOUT", "120 to 7200"),
        ({"HCCL_BUFFSIZE": "200M"}, "HCCL_BUFFSIZE", "whole number"),
        ({"HCCL_EXEC_TIMEOUT": "3600", "HCCL_EVENT_TIMEOUT": "1800"}, "HCCL_EVENT_TIMEOUT", "3660"),
        ({"HCCL_OP_EXPANSION_MODE": "AIV"}, "HCCL_OP_EXPANSION_MODE", "AI_CPU or HOST"),
        ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "TORCH_DEVICE_BACKEND_AUTOLOAD", "keeps torch_npu away"),
        ({"ASCEND_LAUNCH_BLOCKING": "1"}, "ASCEND_LAUNCH_BLOCKING", "every launch waits"),
    ],
)
def test_what_would_spoil_a_job_is_named_with_what_to_do(given, name, advice):
    (problem,) = environment.problems(given)
    assert problem.name == name and advice in problem.advice and given[name] in problem.found


def test_doctor_looks_at_a_nodes_variables(tmp_path):
    from lab_utils.doctor._machine import Machine
    from lab_utils.doctor.checks import ascend_environment

    def rows(**environ):
        return ascend_environment.check(
            Machine(runs=tmp_path, system=tmp_path, environ={"PATH": "", **environ})
        )

    (row,) = rows()
    assert row.ok is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "davinci0").touch()
    (row,) = rows()
    assert row.ok and "launch scripts set" in row.found
    (row,) = rows(HCCL_CONNECT_TIMEOUT="1800")
    assert row.ok and "HCCL_CONNECT_TIMEOUT=1800" in row.found
    (row,) = rows(HCCL_CONNECT_TIMEOUT="10")
    assert row.ok is False and "120 to 7200" in row.advice
