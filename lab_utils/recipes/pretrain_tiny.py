"""Pre-training of the shipped base model on running text about the world of the tasks: an hour of two CPU cores."""

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
        name="pretrain_tiny",
        model=ModelSection(source="preset:tiny"),
        data=DataSection(
            train=(DataSource(manifest="ascent-tasks-text"),),
            validation=(DataSource(manifest="ascent-tasks-text", split="validation"),),
            row_tokens=512,
        ),
        optim=OptimSection(lr=3e-3, weight_decay=0.1),
        schedule=ScheduleSection(
            steps=3000,
            batch_tokens=4096,
            warmup_steps=60,
            shape="wsd",
            decay_fraction=0.3,
            final_lr_ratio=0.02,
            eval_every=300,
            save_every=300,
        ),
        cluster=ClusterSection(nproc=2),
    )
