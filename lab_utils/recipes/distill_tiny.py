"""On-policy distillation of specialists into one student: set model.source and objective.teachers to their weights."""

from lab_utils.recipe import (
    ClusterSection,
    DataSection,
    DataSource,
    DistillObjective,
    ModelSection,
    OptimSection,
    Recipe,
    RolloutSection,
    ScheduleSection,
    TeacherSource,
)

QUESTIONS = "ascent-tasks-prompts"


def recipe() -> Recipe:
    return Recipe(
        name="distill_tiny",
        model=ModelSection(source="base:tiny"),
        objective=DistillObjective(kind="distill", teachers=(TeacherSource(source="base:tiny"),)),
        rollout=RolloutSection(prompts=64, group_size=1, max_new_tokens=80),
        data=DataSection(
            train=(DataSource(manifest=QUESTIONS),),
            validation=(DataSource(manifest=QUESTIONS, split="validation"),),
            row_tokens=1024,
        ),
        optim=OptimSection(lr=3e-4),
        schedule=ScheduleSection(
            steps=75, batch_tokens=16384, micro_rows=2, warmup_steps=3, final_lr_ratio=0.1, eval_every=25
        ),
        cluster=ClusterSection(nproc=2),
    )
