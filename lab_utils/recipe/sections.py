"""The parts of a recipe, but for its objective (``objectives.py``)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lab_utils.recipe.base import Section


class ModelSection(Section):
    source: str = Field(
        "base:tiny",
        description="Where weights come from: base:NAME (shipped), preset:NAME (random), hf:ORG/NAME, or a path.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Working precision; bfloat16 keeps fp32 master weights in the optimizer."
    )
    checkpointing: Literal["none", "mhc", "attention", "full"] = Field(
        "none",
        description="Activations made again in the backward pass to save memory: the hyper-connections' streams (mhc), "
        "attention, or whole layers (full).",
    )
    indexer_loss: float = Field(
        0.01, ge=0, description="Weight of the KL loss that trains the lightning indexer (V4 only)."
    )
    indexer_phase: Literal["sparse", "warmup"] = Field(
        "sparse",
        description="warmup: dense attention, and nothing but the indexer learns, before it may select (V4 only).",
    )
    mtp_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of multi-token prediction (V4 only; V4 used 0.3, then 0.1); 0 leaves its block out of the "
        "model and of what is saved.",
    )
    balance_loss: float = Field(
        0.0, ge=0, description="Weight of the experts' sequence-wise balance loss (V4 only; V4 used 1e-4)."
    )
    balance_rate: float = Field(
        0.0,
        ge=0,
        description="Step of the routers' balance bias (V4 only; 0.001 in pre-training); 0 keeps a trained model's.",
    )
    tokenizer: str | None = Field(
        None,
        description="Folder or tokenizer.json; absent: the one beside the weights, else the shipped one.",
    )
    encoding: str | None = Field(
        None,
        description="A checkpoint's encoding/ folder with the official fixed texts; absent: the shipped wording.",
    )

    @model_validator(mode="after")
    def _warmup_trains_the_indexer(self) -> ModelSection:
        if self.indexer_phase == "warmup" and not self.indexer_loss:
            raise ValueError(
                "model.indexer_phase is warmup, in which nothing but the indexer learns, and model.indexer_loss is 0: "
                "give it a weight, as 0.01"
            )
        return self


class DataSource(Section):
    manifest: str = Field(description="Name of a manifest in data_manifests/, or a path to one.")
    split: str = Field("train", description="Split of the manifest.")
    families: tuple[str, ...] = Field((), description="Rows of these task families alone; none: all.")
    weight: float = Field(1.0, gt=0, description="How often an epoch passes over this source (1.0 = once).")


class DataSection(Section):
    train: tuple[DataSource, ...] = Field(description="Sources that are trained on.")
    validation: tuple[DataSource, ...] = Field((), description="Sources of eval/loss; none: no evaluation.")
    row_tokens: int = Field(1024, ge=16, description="T: tokens in a packed row.")
    mode: Literal["chat", "thinking"] = Field(
        "chat", description="DeepSeek-V4 reasoning mode of the encoding."
    )
    drop_thinking: bool = Field(True, description="Empty the reasoning of turns before the last user turn.")


class OptimSection(Section):
    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: matrices but embedding and head by Muon, the rest by AdamW; adamw: everything by AdamW.",
    )
    lr: float = Field(1e-3, gt=0, description="Peak learning rate, of Muon and AdamW alike.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's β₁ and β₂.")
    eps: float = Field(1e-8, gt=0, description="AdamW's ε.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum factor μ (Nesterov).")
    update_rms: float = Field(
        0.18, gt=0, description="Muon: RMS of an update before the learning rate (γ of the V4 report)."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    clip_norm: float = Field(
        1.0, ge=0, description="Largest global L2 norm of the gradient; 0 = no clipping."
    )

    @model_validator(mode="after")
    def _muon_fields_need_muon(self) -> OptimSection:
        for name in ("momentum", "update_rms"):
            if self.kind == "adamw" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"optim.{name} is Muon's and would change nothing under optim.kind=adamw: "
                    f"set optim.kind=muon, or leave {name} out"
                )
        return self


class ParallelSection(Section):
    """Degrees, or ``parallel: auto``: the planner's choice for ``cluster.profile``, made when the run is launched."""

    auto: bool = Field(
        False,
        description="The planner chooses all of this section, schedule.micro_rows and model.checkpointing when the run "
        "is launched: the fastest layout that fits cluster.profile (in YAML also parallel: auto).",
    )
    dp: int | None = Field(
        None, ge=1, description="Data-parallel degree: ranks with rows of their own; absent: every rank."
    )
    cp: int = Field(
        1,
        ge=1,
        description="Context-parallel degree: so many ranks share a row, each with a run of its tokens; for rows too "
        "long for one device (objective.kind=sft).",
    )
    ep: int = Field(
        1,
        ge=1,
        description="Expert-parallel degree, a divisor of dp x cp: so many ranks share a layer's experts.",
    )
    pp: int = Field(
        1, ge=1, description="Pipeline stages; the batch of a rank goes through them in micro-batches."
    )
    virtual_stages: int = Field(
        1, ge=1, description="Runs of layers that each pipeline rank holds (interleaved schedule); 1 = 1F1B."
    )
    zero: Literal[0, 1] = Field(
        1, description="ZeRO stage: 1 shards optimizer state and master weights over dp x cp."
    )
    offload: bool = Field(
        False, description="Keep master weights and optimizer state in host memory, and update them there."
    )

    @model_validator(mode="before")
    @classmethod
    def _in_a_word(cls, given: Any) -> Any:
        return {"auto": True} if given == "auto" else given

    @model_validator(mode="after")
    def _is_chosen_or_given(self) -> ParallelSection:
        given = [
            name
            for name in ("dp", "cp", "ep", "pp", "virtual_stages", "offload")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.auto and given:
            raise ValueError(
                f"parallel.auto leaves the layout to the planner, and parallel.{given[0]} is "
                f"{getattr(self, given[0])}: give one of the two"
            )
        return self


class ScheduleSection(Section):
    steps: int = Field(100, ge=1, description="Optimizer steps.")
    batch_tokens: int = Field(
        8192, ge=16, description="Tokens in a global batch, a multiple of data.row_tokens."
    )
    micro_rows: int | None = Field(
        None,
        ge=1,
        description="Rows in one forward pass of one rank; fewer rows = more gradient accumulation.",
    )
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up.")
    shape: Literal["cosine", "wsd", "constant"] = Field("cosine", description="Learning rate after warm-up.")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps in the final decay.")
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate as a share of the peak.")
    eval_every: int = Field(
        0, ge=0, description="Steps between evaluations on data.validation; 0 = at the end."
    )
    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0 = at the end only.")
    keep_last: int = Field(2, ge=1, description="Complete checkpoints to keep.")
    async_save: bool = Field(
        True,
        description="Write checkpoints beside training; the step waits only for the copy to host memory.",
    )
    max_skipped: int = Field(5, ge=1, description="Non-finite steps in a row after which the run stops.")


class ClusterSection(Section):
    accelerator: Literal["auto", "cpu", "cuda", "npu"] = Field(
        "auto", description="Device kind; auto = best found."
    )
    profile: str | None = Field(
        None,
        description="Cluster that parallel.auto plans for: a name (lab plan --clusters) or a YAML file; absent: the "
        "usual one of the accelerator, and for CPUs what lab doctor --measure wrote.",
    )
    launcher: str = Field("local", description="How the job is started: a member of lab_utils/launchers.")
    nodes: int = Field(1, ge=1, description="Machines that the job runs on; more than one needs a scheduler.")
    nproc: int = Field(1, ge=1, description="Ranks on a node: one per device (910C: one per die).")
    threads: int | None = Field(None, ge=1, description="CPU threads a rank; absent: cores ÷ ranks.")
    options: dict[str, Any] = Field(
        {},
        description="The launcher's own settings, as a partition or an image: lab render --options NAME lists them.",
    )

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.nproc


class TrackingSection(Section):
    wandb: Literal["offline", "online", "disabled"] = Field(
        "offline", description="W&B mode; offline never calls out."
    )
    project: str = Field("ascent", description="W&B project.")
    entity: str | None = Field(None, description="W&B team or user.")
    base_url: str | None = Field(None, description="W&B server; needed for online.")
    log_every: int = Field(1, ge=1, description="Steps between logged lines.")
    chip_seconds: float = Field(2.0, gt=0, description="Seconds between samples of chip utilisation.")

    @model_validator(mode="after")
    def _online_needs_a_server(self) -> TrackingSection:
        if self.wandb == "online" and not self.base_url:
            raise ValueError(
                "tracking.wandb is online but tracking.base_url is empty: name the server, or use offline"
            )
        return self
