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
            steps=200, batch_tokens=8192, warmup_steps=20, save_every=100, eval_every=50
        ),
        cluster=ClusterSection(nproc=2),
    )
