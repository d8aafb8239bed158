"""Reinforcement learning (GRPO) with a verifier on one task family: set model.source to fine-tuned weights."""

from lab_utils.recipe import (
    ClusterSection,
    DataSection,
    DataSource,
    GrpoObjective,
    ModelSection,
    OptimSection,
    Recipe,
    RewardSource,
    RolloutSection,
    ScheduleSection,
)

QUESTIONS = "ascent-tasks-prompts"


def recipe() -> Recipe:
    return Recipe(
        name="grpo_tiny",
        model=ModelSection(source="base:tiny"),
        objective=GrpoObjective(kind="grpo", rewards=(RewardSource(name="exact"),), kl_weight=0.005),
        rollout=RolloutSection(prompts=32, group_size=16, max_new_tokens=32, slots=256),
        data=DataSection(
            train=(DataSource(manifest=QUESTIONS, families=("lists",)),),
            validation=(DataSource(manifest=QUESTIONS, split="validation", families=("lists",)),),
            row_tokens=512,
        ),
        optim=OptimSection(lr=4e-4),
        schedule=ScheduleSection(
            steps=100, batch_tokens=16384, micro_rows=4, warmup_steps=5, final_lr_ratio=0.2, eval_every=25
        ),
        cluster=ClusterSection(nproc=2),
    )
