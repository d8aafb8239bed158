"""What a site and a job on Kubernetes can set; ``lab render RECIPE --launcher volcano`` shows what it makes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lab_utils.launchers._base import LauncherOptions, Variables, Words
from lab_utils.recipe.base import Section

_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"


class Volume(Section):
    """A folder that every pod sees: a claim, a folder of the nodes, or an NFS export."""

    path: str = Field(pattern=r"^/[^:]*$", description="Where it is mounted; runs: as on this machine.")
    claim: str | None = Field(None, pattern=_NAME, description="Name of a PersistentVolumeClaim.")
    host_path: str | None = Field(None, pattern=r"^/", description="A folder of the nodes.")
    nfs: str | None = Field(None, pattern=r"^[^:\s]+:/", description="server:/folder.")
    read_only: bool = Field(False, description="Not to be written.")

    @model_validator(mode="after")
    def _one_source(self) -> Volume:
        if sum(bool(source) for source in (self.claim, self.host_path, self.nfs)) != 1:
            raise ValueError(f"the volume at {self.path} needs exactly one of claim, host_path and nfs")
        return self

    def source(self) -> dict[str, Any]:
        if self.claim:
            return {"persistentVolumeClaim": {"claimName": self.claim}}
        if self.host_path:
            return {"hostPath": {"path": self.host_path}}
        server, _, path = str(self.nfs).partition(":")
        return {"nfs": {"server": server, "path": path}}


class Options(LauncherOptions):
    """Settings of the site and the job; ``lab render RECIPE --launcher volcano`` shows what they make."""

    image: str = Field(
        pattern=r"^\S+$",
        examples=["registry.example/ascent:1"],
        description="Container image, with CANN, torch_npu and this package.",
    )
    kind: Literal["AscendJob", "Job"] = Field(
        "AscendJob", description="AscendJob needs the Ascend operator; Job is plain Volcano."
    )
    namespace: str = Field("default", pattern=_NAME, description="Kubernetes namespace.")
    context: str | None = Field(None, description="Context of kubectl; absent: its current one.")
    queue: str = Field("default", pattern=_NAME, description="Volcano's queue.")
    priority_class: str | None = Field(None, pattern=_NAME, description="Priority class of the job.")
    volumes: tuple[Volume, ...] = Field(
        (), description="Shared folders, as [{path: /data, claim: data}]; one must hold the runs."
    )
    accelerator_type: str | None = Field(
        None,
        pattern=r"^\S+$",
        description="Kind of node: module-910b-8, module-a3-16 or module-a3-16-super-pod.",
    )
    node_selector: Words = Field({}, description="More labels that nodes must have.")
    sp_block: int | None = Field(
        None, ge=1, description="Devices a logical SuperPoD (910C): chips within it speak over HCCS."
    )
    resource: str | None = Field(
        None,
        pattern=r"^\S+$",
        description="Resource that is asked for; absent: huawei.com/Ascend910 or nvidia.com/gpu.",
    )
    chips: int | None = Field(None, ge=1, description="Devices a node; absent: one for each rank.")
    cpus: int | None = Field(None, ge=1, description="CPU cores a node; absent: no request.")
    memory: str | None = Field(
        None, pattern=r"^\d+(Ki|Mi|Gi|Ti)?$", description="Host memory a node, as 900Gi."
    )
    shared_memory: str | None = Field(
        None,
        pattern=r"^\d+(Mi|Gi)$",
        description="Limit of /dev/shm, as 64Gi; absent: half the node's memory.",
    )
    driver: str = Field(
        "/usr/local/Ascend/driver", pattern=r"^/", description="The nodes' CANN driver, mounted."
    )
    restarts: int = Field(3, ge=0, description="Times that an evicted job is started again; the run resumes.")
    grace_seconds: int = Field(
        300, ge=30, description="Seconds that an evicted pod has to save a checkpoint."
    )
    port: int = Field(2222, ge=1024, le=65535, description="Port on which the first pod is met.")
    host_network: bool = Field(False, description="Pods on the nodes' network; advised above 1,000 nodes.")
    interface: str | None = Field(None, pattern=r"^\S+$", description="Network of the ranks, as eth0.")
    profile: str | None = Field(
        None,
        pattern=r"^\S+$",
        description="The cluster as the planner names it, as ascend-910c: its variables.",
    )
    cann: str | None = Field(None, description="CANN's set_env.sh in the image; absent: the usual places.")
    python: str = Field("python", description="Python in the image.")
    setup: tuple[str, ...] = Field((), description="Lines of bash that come first in every pod.")
    environment: Variables = Field({}, description="More variables for the ranks; they win over ours.")
    pod: dict[str, Any] = Field(
        {}, description="More keys of the pods' spec, as tolerations, imagePullSecrets, serviceAccountName."
    )

    @field_validator("pod")
    @classmethod
    def _not_ours(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key in given:
            if key in ("containers", "volumes", "nodeSelector", "restartPolicy", "affinity"):
                raise ValueError(f"'{key}' is set by the manifest itself: leave it out (lab render shows it)")
        return given
