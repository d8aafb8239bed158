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
        objective=GrpoObjective(kind="grpo", rewards=(RewardSource(name="exact"),), kl_weight=0.02),
        rollout=RolloutSection(prompts=16, group_size=8, max_new_tokens=80),
        data=DataSection(
            train=(DataSource(manifest=QUESTIONS, families=("tools",)),),
            validation=(DataSource(manifest=QUESTIONS, split="validation", families=("tools",)),),
            row_tokens=1024,
        ),
        optim=OptimSection(lr=2e-4),
        schedule=ScheduleSection(
            steps=60, batch_tokens=16384, warmup_steps=3, final_lr_ratio=0.2, eval_every=10
        ),
        cluster=ClusterSection(nproc=2),
    )
