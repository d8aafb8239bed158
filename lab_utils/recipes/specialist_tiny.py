"""Further fine-tuning on some families alone, a teacher for distill_tiny: set model.source to fine-tuned weights."""

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
        name="specialist_tiny",
        model=ModelSection(source="base:tiny"),
        data=DataSection(
            train=(DataSource(manifest="ascent-tasks-sft", families=("tools", "formats")),), row_tokens=512
        ),
        optim=OptimSection(lr=1e-3),
        schedule=ScheduleSection(steps=80, batch_tokens=4096, warmup_steps=10, final_lr_ratio=0.05),
        cluster=ClusterSection(nproc=2),
    )
