"""The Kubernetes object of a run, of two kinds.

``AscendJob`` (``mindxdl.gitee.com/v1``) is the Ascend operator's own: it tells each pod its rank, and where the first
one is. A plain Volcano ``Job`` (``batch.volcano.sh/v1alpha1``) needs no operator and takes other devices too.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lab_utils.errors import RecipeError
from lab_utils.launchers import _cluster
from lab_utils.launchers._base import options_of
from lab_utils.launchers._scheduled import AGAIN
from lab_utils.launchers._volcano_options import Options
from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory

NPU = "huawei.com/Ascend910"  # 910B and 910C alike
RESOURCES = {"npu": NPU, "auto": NPU, "cuda": "nvidia.com/gpu"}
MANAGED = {"app.kubernetes.io/managed-by": "ascent"}
RUN_LABEL = "ascent/run"


def job_name(run: str) -> str:
    """A run's name as Kubernetes takes it: it keeps its end, which tells runs apart."""
    text = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    return text if len(text) <= 52 else text[-52:].lstrip("-")  # pods add their own ending to it


def manifest(run_dir: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """The object that is submitted."""
    options: Options = options_of(recipe, "volcano")
    name, nodes = job_name(run_dir.name), recipe.cluster.nodes
    kind = _cluster.device(recipe, options.resource)
    labels = {**MANAGED, RUN_LABEL: name}
    if kind in ("npu", "auto"):
        labels["ring-controller.atlas"] = "ascend-910b"
    annotations = {"sp-block": str(options.sp_block)} if options.sp_block else {}
    template = {
        "metadata": {"labels": labels, **({"annotations": annotations} if annotations else {})},
        "spec": _pod(run_dir, recipe, options, kind, name),
    }
    metadata: dict[str, Any] = {"name": name, "namespace": options.namespace, "labels": dict(labels)}
    if annotations:
        metadata["annotations"] = dict(annotations)
    if options.kind == "AscendJob":
        metadata["labels"] |= {
            "framework": "pytorch",
            "fault-scheduling": "grace",
            "fault-retry-times": str(options.restarts),
        }
        policy: dict[str, Any] = {"minAvailable": nodes, "queue": options.queue}
        if options.priority_class:
            policy["priorityClass"] = options.priority_class
        replica = {"restartPolicy": "Never", "template": template}
        replicas = {"Master": {"replicas": 1, **replica}}
        if nodes > 1:
            replicas["Worker"] = {"replicas": nodes - 1, **replica}
        return {
            "apiVersion": "mindxdl.gitee.com/v1",
            "kind": "AscendJob",
            "metadata": metadata,
            "spec": {
                "schedulerName": "volcano",
                "runPolicy": {"backoffLimit": options.restarts, "schedulingPolicy": policy},
                "successPolicy": "AllWorkers",
                "replicaSpecs": replicas,
            },
        }
    return {
        "apiVersion": "batch.volcano.sh/v1alpha1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "schedulerName": "volcano",
            "minAvailable": nodes,
            "queue": options.queue,
            **({"priorityClassName": options.priority_class} if options.priority_class else {}),
            "maxRetry": options.restarts,
            # env tells a pod its number, svc gives pods names that the others can look up.
            "plugins": {"env": [], "svc": []},
            "policies": [
                {"exitCode": AGAIN, "action": "RestartJob"},
                {"event": "PodEvicted", "action": "RestartJob"},
                {"event": "PodFailed", "action": "TerminateJob"},
            ],
            "tasks": [{"name": "node", "replicas": nodes, "template": template}],
        },
    }


def _pod(run_dir: RunDirectory, recipe: Recipe, options: Options, kind: str, name: str) -> dict[str, Any]:
    npu = kind in ("npu", "auto")
    resource = options.resource or RESOURCES.get(kind)
    wanted: dict[str, Any] = {resource: options.chips or recipe.cluster.nproc} if resource else {}
    wanted |= {"cpu": options.cpus} if options.cpus else {}
    wanted |= {"memory": options.memory} if options.memory else {}
    volumes = [({"name": f"shared-{i}", **v.source()}, v) for i, v in enumerate(options.volumes)]
    mounts = [
        {"name": source["name"], "mountPath": v.path, **({"readOnly": True} if v.read_only else {})}
        for source, v in volumes
    ]
    memory = {"medium": "Memory", **({"sizeLimit": options.shared_memory} if options.shared_memory else {})}
    sources = [source for source, _ in volumes] + [{"name": "shm", "emptyDir": memory}]
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    variables: list[dict[str, Any]] = []
    if npu:
        sources.append({"name": "ascend-driver", "hostPath": {"path": options.driver}})
        mounts.append({"name": "ascend-driver", "mountPath": options.driver, "readOnly": True})
        # The device plugin writes which chips a pod was given; Ascend's container runtime reads this variable.
        variables.append(_field("ASCEND_VISIBLE_DEVICES", f"metadata.annotations['{resource}']"))
    if npu and options.host_network:
        variables.append(_field("HCCL_IF_IP", "status.hostIP"))
    container = {
        "name": "ascend",  # the Ascend operator looks for this name
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["/bin/bash", "-c"],
        "args": [script(run_dir, recipe, options, kind, name)],
        **({"env": variables} if variables else {}),
        "ports": [{"name": "ascendjob-port", "containerPort": options.port}],
        **({"resources": {"requests": wanted, "limits": dict(wanted)}} if wanted else {}),
        "volumeMounts": mounts,
    }
    selector = {**({"accelerator-type": options.accelerator_type} if options.accelerator_type else {})}
    selector |= options.node_selector
    return {
        **options.pod,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_seconds,
        **({"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if options.host_network else {}),
        **({"nodeSelector": selector} if selector else {}),
        "affinity": {
            # One pod a node.
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "labelSelector": {"matchLabels": {RUN_LABEL: name}},
                        "topologyKey": "kubernetes.io/hostname",
                    }
                ]
            }
        },
        "containers": [container],
        "volumes": sources,
    }


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def script(run_dir: RunDirectory, recipe: Recipe, options: Options, kind: str, name: str) -> str:
    """What the container of every pod runs."""
    if options.kind == "AscendJob":
        meet = ["# The Ascend operator has set RANK (of this pod), MASTER_ADDR and MASTER_PORT", "node=$RANK"]
    else:
        meet = [
            "# Volcano has set this pod's number, and names the first pod",
            "node=$VC_TASK_INDEX",
            f"export MASTER_ADDR={name}-node-0.{name} MASTER_PORT={options.port}",
        ]
    torchrun = _cluster.torchrun(recipe, '"$node"', '"$MASTER_ADDR"', '"$MASTER_PORT"')
    sections = [
        ["set -euo pipefail", *_cluster.names(run_dir, options.python)],
        [
            *meet,
            "# To the run's own logs, and to kubectl logs",
            'mkdir -p "$run/logs"',
            'exec > >(tee -a "$run/logs/node-$node.log") 2>&1',
        ],
        _cluster.site(options.setup),
        _cluster.cann(kind, options.cann, options.python),
        _cluster.environment(run_dir, recipe, kind, options.interface, options.environment),
        [
            "# Keeps SIGTERM from torchrun, which would give its ranks 30 s: they save a checkpoint instead.",
            f"command=({_cluster.joined(torchrun)})",
            'if [ "$node" = 0 ]; then',
            f"  # Stays with the job: heartbeat, final state, and exit code {AGAIN} to be started again.",
            f'  exec "$python" -m {_cluster.SCHEDULED} pod "$run" -- "${{command[@]}}"',
            "fi",
            'exec "${command[@]}"',
        ],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Scripts as blocks of lines; nothing is written as a reference to what stood before."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def render(run_dir: RunDirectory, recipe: Recipe) -> str:
    tree = manifest(run_dir, recipe)
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    cluster = recipe.cluster
    return (
        f"# {run_dir.name}: {cluster.nodes} pods × {cluster.nproc} ranks on Kubernetes, recipe {recipe.hash[:12]}.\n"
        f"# kubectl create -f {run_dir.path}/{MANIFEST}\n{text}"
    )


MANIFEST = "job.yaml"


@cache
def schema() -> dict[str, Any]:
    """What this project checks of the two kinds of object; see the head of the file."""
    return json.loads(Path(__file__).with_name("_manifest_schema.json").read_text(encoding="utf-8"))


def validate(tree: dict[str, Any]) -> None:
    """Hold an object to ``_manifest_schema.json``.

    Raises:
        RecipeError: the first departure, with its place.
    """
    from jsonschema import Draft202012Validator

    kinds = schema()["$defs"]
    rules = {**schema(), **kinds[tree["kind"]]}
    problem = next(
        iter(sorted(Draft202012Validator(rules).iter_errors(tree), key=lambda e: list(e.path))), None
    )
    if problem is not None:
        place = ".".join(str(part) for part in problem.absolute_path) or "the object"
        raise RecipeError(
            f"cluster.options make no valid {tree['kind']}: {place}: {problem.message[:200].rstrip('.')}."
        )
