"""Manifests against this project's own schema, and the launcher against a stand-in for kubectl.

No cluster took part: that a real one admits and runs these objects is not shown here.
"""

import json
import subprocess
from itertools import pairwise

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_in_commands import Commands

from lab_utils.errors import RecipeError, RunError
from lab_utils.launchers import volcano
from lab_utils.launchers._manifest import job_name, manifest, validate
from lab_utils.launchers._scheduled import AGAIN
from lab_utils.launchers._volcano_options import Options
from lab_utils.runs.states import JobState

NPU = "huawei.com/Ascend910"


@pytest.fixture
def recipe(recipe, tmp_path):
    """Two 910C nodes in one logical SuperPoD."""
    options = {
        "image": "registry.example/ascent:1",
        "accelerator_type": "module-a3-16-super-pod",
        "sp_block": 32,
        "volumes": [{"path": str(tmp_path), "claim": "runs"}],
    }
    changes = {"launcher": "volcano", "accelerator": "npu", "nodes": 2, "nproc": 16, "options": options}
    return recipe.with_changes({f"cluster.{key}": value for key, value in changes.items()})


def option(recipe, **options):
    return recipe.with_changes({f"cluster.options.{key}": value for key, value in options.items()})


def pods(tree) -> list[dict]:
    """The spec of each kind of pod, with how many there are."""
    spec = tree["spec"]
    groups = spec["replicaSpecs"].values() if "replicaSpecs" in spec else spec["tasks"]
    return [(group["replicas"], group["template"]["spec"]) for group in groups]


# -- the manifest --------------------------------------------------------------------------------------


def test_an_ascend_job_has_a_master_and_workers_of_whole_nodes(run_dir, recipe):
    tree = yaml.safe_load(volcano.render(run_dir, recipe))
    validate(tree)
    assert (tree["apiVersion"], tree["kind"]) == ("mindxdl.gitee.com/v1", "AscendJob")
    assert tree["metadata"]["labels"]["framework"] == "pytorch"
    assert tree["metadata"]["annotations"] == {"sp-block": "32"}
    assert tree["spec"]["schedulerName"] == "volcano"
    assert tree["spec"]["runPolicy"]["schedulingPolicy"] == {"minAvailable": 2, "queue": "default"}
    assert [count for count, _ in pods(tree)] == [1, 1]
    for _, pod in pods(tree):
        (container,) = pod["containers"]
        assert container["name"] == "ascend"
        assert container["ports"] == [{"name": "ascendjob-port", "containerPort": 2222}]
        assert container["resources"] == {"requests": {NPU: 16}, "limits": {NPU: 16}}
        assert pod["nodeSelector"] == {"accelerator-type": "module-a3-16-super-pod"}
        assert {"name": "ascend-driver", "hostPath": {"path": "/usr/local/Ascend/driver"}} in pod["volumes"]
        assert '--node-rank "$node"' in container["args"][0] and "node=$RANK" in container["args"][0]


def test_one_node_is_a_master_alone(run_dir, recipe):
    tree = manifest(run_dir, option(recipe.with_changes({"cluster.nodes": 1}), sp_block=16))
    assert (
        list(tree["spec"]["replicaSpecs"]) == ["Master"]
        and tree["spec"]["runPolicy"]["schedulingPolicy"]["minAvailable"] == 1
    )


def test_a_plain_job_of_volcano_needs_no_operator(run_dir, recipe):
    tree = yaml.safe_load(volcano.render(run_dir, option(recipe, kind="Job", priority_class="urgent")))
    validate(tree)
    assert (tree["apiVersion"], tree["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    name = tree["metadata"]["name"]
    assert [count for count, _ in pods(tree)] == [2] and tree["spec"]["minAvailable"] == 2
    assert tree["spec"]["policies"][0] == {"exitCode": AGAIN, "action": "RestartJob"}
    script = pods(tree)[0][1]["containers"][0]["args"][0]
    assert "node=$VC_TASK_INDEX" in script and f"MASTER_ADDR={name}-node-0.{name}" in script
    assert set(tree["spec"]["plugins"]) == {"env", "svc"}


def test_gpus_and_processors_have_their_own_resources(run_dir, recipe):
    cuda = recipe.with_changes({"cluster.accelerator": "cuda"})
    (_, pod), _ = pods(manifest(run_dir, option(cuda, chips=8, cpus=64, memory="512Gi")))
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8, "cpu": 64, "memory": "512Gi"}
    assert "env" not in pod["containers"][0] and all(
        "ascend" not in volume["name"] for volume in pod["volumes"]
    )
    (_, pod), _ = pods(manifest(run_dir, recipe.with_changes({"cluster.accelerator": "cpu"})))
    assert "resources" not in pod["containers"][0]


def test_volumes_keys_of_the_pod_and_the_nodes_network_are_passed_on(run_dir, recipe):
    volumes = [
        {"path": "/data", "nfs": "10.0.0.1:/export/data", "read_only": True},
        {"path": "/scratch", "host_path": "/mnt/scratch"},
    ]
    keys = {"tolerations": [{"key": "npu", "operator": "Exists"}], "serviceAccountName": "trainer"}
    changed = option(
        recipe, volumes=volumes, pod=keys, host_network=True, node_selector={"zone": 3, "hccs": True}
    )
    tree = manifest(run_dir, changed)
    validate(tree)
    (_, pod), _ = pods(tree)
    assert {"name": "shared-0", "nfs": {"server": "10.0.0.1", "path": "/export/data"}} in pod["volumes"]
    assert {"name": "shared-0", "mountPath": "/data", "readOnly": True} in pod["containers"][0][
        "volumeMounts"
    ]
    assert (
        pod["serviceAccountName"] == "trainer" and pod["hostNetwork"] and pod["nodeSelector"]["zone"] == "3"
    )
    assert pod["nodeSelector"]["hccs"] == "true"
    assert "HCCL_IF_IP" in [variable["name"] for variable in pod["containers"][0]["env"]]


def run_pod(tree, folder, **environment) -> list[str]:
    """What the container's script comes to on this machine: the command line of its Python, in place of Python."""
    (_, pod) = pods(tree)[0]
    (folder / "bin").mkdir(exist_ok=True)
    python = folder / "bin" / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    container = pod["containers"][0]
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_the_first_pod_supervises_and_every_pod_starts_torchrun(run_dir, recipe, tmp_path):
    tree = manifest(run_dir, recipe)
    place = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "2222"}
    first = run_pod(tree, tmp_path, RANK="0", **place)
    assert (
        first[:3] == ["-m", "lab_utils.launchers._scheduled", "pod"] and "lab_utils.launchers._node" in first
    )
    other = run_pod(tree, tmp_path, RANK="1", **place)
    assert other[:2] == ["-m", "lab_utils.launchers._node"] and "lab_utils.launchers._scheduled" not in other
    words = dict(pairwise(other))
    assert words["--node-rank"] == "1" and words["--master-addr"] == "10.0.0.7" and words["--nnodes"] == "2"
    assert (run_dir.logs / "node-1.log").read_text().startswith("-m")


@given(st.text("abcXYZ019._-", min_size=1, max_size=120).filter(lambda text: text[0].isalnum()))
def test_any_name_of_a_run_is_a_name_for_kubernetes(name):
    found = job_name(f"{name}-20261125-153801-abc123")
    assert len(found) <= 52 and found.endswith("20261125-153801-abc123")
    assert (
        all(letter.isalnum() or letter == "-" for letter in found) and found[0].isalnum() and found.islower()
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["AscendJob", "Job"]),
    nodes=st.integers(1, 200),
    chips=st.sampled_from([1, 2, 8, 16]),
    network=st.booleans(),
    restarts=st.integers(0, 9),
)
def test_whatever_is_asked_for_is_valid(run_dir, recipe, kind, nodes, chips, network, restarts):
    changed = recipe.with_changes({"cluster.nodes": nodes, "cluster.nproc": chips})
    validate(manifest(run_dir, option(changed, kind=kind, host_network=network, restarts=restarts)))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"chips": 9, "accelerator_type": "module-910b-16"}, "9 is not one of"),
        ({"accelerator_type": "a3"}, "does not match"),
        ({"pod": {"tolerations": "all"}}, "tolerations"),
        ({"pod": {"toleration": []}}, "toleration"),
    ],
)
def test_what_the_schema_does_not_know_is_refused_with_its_place(run_dir, recipe, options, words):
    with pytest.raises(RecipeError, match=r"cluster\.options make no valid AscendJob: spec") as caught:
        validate(manifest(run_dir, option(recipe, **options)))
    assert words in str(caught.value)


# -- before a start ------------------------------------------------------------------------------------


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    (tmp_path / "stand-ins").mkdir()
    found = Commands(tmp_path / "stand-ins", monkeypatch, "kubectl")
    volcano._forget()
    yield found
    volcano._forget()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"cluster.options.volumes": []}, "cluster.options.volumes: none holds the folder of runs"),
        ({"cluster.options.sp_block": 24}, "cluster.options.sp_block=24"),
        ({"cluster.nproc": 7, "cluster.options.sp_block": 7}, "one or an even number of devices, not 7"),
        ({"cluster.options.volumes": [{"path": "/data"}]}, "exactly one of claim, host_path and nfs"),
        ({"cluster.options.image": None}, "cluster.options.image"),
        ({"cluster.options.pod": {"containers": []}}, "'containers' is set by the manifest itself"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(run_dir, recipe, kubectl, changes, words):
    with pytest.raises(RecipeError) as caught:
        volcano.check(recipe.with_changes(changes), run_dir.path.parent)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_sound_job_is_let_through_with_what_is_taken_for_granted(run_dir, recipe, kubectl):
    assert str(run_dir.path.parent) in volcano.check(recipe, run_dir.path.parent)


def test_the_queue_is_described_or_missed(recipe, kubectl):
    kubectl.answer(
        "kubectl", "queues.scheduling", json.dumps({"status": {"state": "Open", "running": 3, "pending": 2}})
    )
    assert volcano.queue(recipe) == "Queue default: of its jobs 3 run, 2 wait; 2 pods asked for."
    kubectl.answer(
        "kubectl",
        "queues.scheduling",
        code=1,
        err='Error from server (NotFound): queues "default" not found\n',
    )
    with pytest.raises(RunError, match="no queue 'default'"):
        volcano.queue(recipe)


# -- the job -------------------------------------------------------------------------------------------


def submitted(run_dir, recipe, kubectl) -> str:
    kubectl.answer("kubectl", "delete")
    kubectl.answer("kubectl", "create")
    return volcano.submit(run_dir, recipe)


def answer_with(kubectl, run_dir, status, pods=()):
    job = {"metadata": {"name": job_name(run_dir.name)}, "status": status}
    kubectl.answer("kubectl", "get ascendjobs.mindxdl.gitee.com", json.dumps({"items": [job]}))
    kubectl.answer("kubectl", "get pods", json.dumps({"items": list(pods)}))
    volcano._forget()


def condition(kind, **more):
    return {"type": kind, "status": "True", **more}


def test_a_job_is_created_from_the_manifest_that_lies_in_the_run(run_dir, recipe, kubectl):
    job = submitted(run_dir, recipe, kubectl)
    assert (
        job == f"default/{job_name(run_dir.name)}" == run_dir.status["job"]
        and run_dir.status["state"] == "queued"
    )
    delete, create = kubectl.calls()
    assert delete[1:4] == ["--namespace=default", "delete", "ascendjobs.mindxdl.gitee.com"]
    assert create == ["kubectl", "--namespace=default", "create", "-f", str(run_dir.path / "job.yaml")]
    assert (run_dir.path / "job.yaml").read_text() == volcano.render(run_dir, recipe)


def test_a_refusal_is_one_sentence_and_the_run_has_failed(run_dir, recipe, kubectl):
    kubectl.answer(
        "kubectl", "", code=1, err="Error from server: admission webhook denied the request: no quota\n"
    )
    with pytest.raises(RunError, match=r"did not take the job: .*no quota"):
        volcano.submit(run_dir, recipe)
    assert run_dir.status["state"] == "failed" and "no quota" in run_dir.status["error"]


@pytest.mark.parametrize(
    "status, expected",
    [
        ({}, JobState.PENDING),
        ({"conditions": [condition("Created")]}, JobState.PENDING),
        ({"conditions": [condition("Created"), condition("Running")]}, JobState.RUNNING),
        ({"conditions": [condition("Running"), condition("Restarting")]}, JobState.PENDING),
        ({"conditions": [condition("Running"), condition("Succeeded")]}, JobState.GONE),
        ({"conditions": [condition("Running"), condition("Failed")]}, JobState.GONE),
        ({"state": {"phase": "Pending"}}, JobState.PENDING),
        ({"state": {"phase": "Running"}}, JobState.RUNNING),
        ({"state": {"phase": "Restarting"}}, JobState.PENDING),
        ({"state": {"phase": "Completed"}}, JobState.GONE),
        ({"state": {"phase": "Terminated"}}, JobState.GONE),
    ],
)
def test_conditions_and_phases_are_told_as_our_states(run_dir, recipe, kubectl, status, expected):
    submitted(run_dir, recipe, kubectl)
    answer_with(kubectl, run_dir, status)
    assert volcano.status(run_dir) == expected == volcano.describe(run_dir).state


def test_a_job_that_is_not_listed_is_gone_and_a_cluster_that_is_away_leaves_it_open(run_dir, recipe, kubectl):
    submitted(run_dir, recipe, kubectl)
    kubectl.answer("kubectl", "get ascendjobs", json.dumps({"items": []}))
    assert volcano.status(run_dir) == JobState.GONE
    kubectl.answer(
        "kubectl", "get ascendjobs", code=1, err="Unable to connect to the server: dial tcp: i/o timeout\n"
    )
    volcano._forget()
    assert volcano.status(run_dir) == JobState.UNKNOWN
    assert "Unable to connect" in volcano.describe(run_dir).detail


def test_one_question_serves_for_a_while(run_dir, recipe, kubectl):
    submitted(run_dir, recipe, kubectl)
    answer_with(kubectl, run_dir, {"conditions": [condition("Running")]})
    for _ in range(5):
        volcano.status(run_dir)
    assert len([call for call in kubectl.calls() if "get" in call]) == 1


def test_a_waiting_job_says_what_its_pods_wait_for(run_dir, recipe, kubectl):
    submitted(run_dir, recipe, kubectl)
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/4 nodes: no chips",
    }
    pod = {"metadata": {"name": "x-master-0"}, "spec": {}, "status": {"conditions": [unschedulable]}}
    answer_with(kubectl, run_dir, {"conditions": [condition("Created")]}, [pod])
    assert volcano.describe(run_dir).detail == "Unschedulable: 0/4 nodes: no chips"
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    pod = {"metadata": {"name": "x-master-0"}, "spec": {}, "status": {"containerStatuses": [waiting]}}
    answer_with(kubectl, run_dir, {"conditions": [condition("Created")]}, [pod])
    assert volcano.describe(run_dir).detail == "ImagePullBackOff: no such image"


def test_a_running_job_says_its_nodes_in_the_order_of_ranks(run_dir, recipe, kubectl):
    submitted(run_dir, recipe, kubectl)
    names = {"x-worker-10": "k", "x-worker-2": "c", "x-master-0": "a"}
    running = [
        {"metadata": {"name": name}, "spec": {"nodeName": node}, "status": {}} for name, node in names.items()
    ]
    answer_with(kubectl, run_dir, {"state": {"phase": "Running"}, "retryCount": 2}, running)
    info = volcano.describe(run_dir)
    assert info.nodes == ("a", "c", "k") and info.restarts == 2 and info.detail == ""


def test_a_job_that_waits_is_deleted_and_one_that_runs_is_asked(run_dir, recipe, kubectl):
    submitted(run_dir, recipe, kubectl)
    answer_with(kubectl, run_dir, {"conditions": [condition("Running")]})
    before = len(kubectl.calls())
    volcano.stop(run_dir)
    assert run_dir.status["state"] == "stopping" and not [
        c for c in kubectl.calls()[before:] if "delete" in c
    ]
    answer_with(kubectl, run_dir, {"conditions": [condition("Created")]})
    volcano.stop(run_dir)
    assert run_dir.status["state"] == "stopped" and "delete" in kubectl.calls()[-1]
    assert volcano.status(run_dir) == JobState.GONE


def test_before_the_run_has_logs_the_containers_are_asked(run_dir, recipe, kubectl):
    submitted(run_dir, recipe, kubectl)
    kubectl.answer("kubectl", "logs", "[pod/x-master-0/ascend] error: a does not see /runs\n")
    assert "does not see" in volcano.logs(run_dir)
    (run_dir.logs / "node-0.log").write_text("started\n")
    assert volcano.logs(run_dir) == "==> node-0.log <==\nstarted"


def test_the_context_of_kubectl_can_be_named(run_dir, recipe, kubectl):
    submitted(run_dir, option(recipe, context="npu-cluster", namespace="lab"), kubectl)
    assert all(call[1:3] == ["--context=npu-cluster", "--namespace=lab"] for call in kubectl.calls())


def test_options_read_back_as_they_were_written(recipe):
    assert Options.model_validate(Options.model_validate(recipe.cluster.options).model_dump()).sp_block == 32
