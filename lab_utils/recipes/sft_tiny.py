"""Supervised fine-tuning of the shipped base model on the shipped tasks: minutes on two CPU cores."""

from lab_utils.recipe import (
    ClusterSection,
    DataSection,
    DataSource,
    ModelSection,
    OptimSection,
    Recipe,
    ScheduleSection,
)


def recipe() -> Recipe:
    return Recipe(
        name="sft_tiny",
        model=ModelSection(source="base:tiny"),
        data=DataSection(
            train=(DataSource(manifest="ascent-tasks-sft"),),
            validation=(DataSource(manifest="ascent-tasks-sft", split="validation"),),
            row_tokens=512,
        ),
        optim=OptimSection(lr=2e-3),
        schedule=ScheduleSection(
            steps=500, batch_tokens=4096, warmup_steps=20, final_lr_ratio=0.05, eval_every=100, save_every=250
        ),
        cluster=ClusterSection(nproc=2),
    )
