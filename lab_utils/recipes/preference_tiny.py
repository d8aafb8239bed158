"""Preference optimisation (DPO) of a fine-tuned model on the shipped pairs: set model.source to its weights."""

from lab_utils.recipe import (
    ClusterSection,
    DataSection,
    DataSource,
    ModelSection,
    OptimSection,
    PreferenceObjective,
    Recipe,
    ScheduleSection,
)

PAIRS, QUESTIONS = "ascent-tasks-preference", "ascent-tasks-prompts"


def recipe() -> Recipe:
    return Recipe(
        name="preference_tiny",
        model=ModelSection(source="base:tiny"),
        # The chosen answers' own likelihood keeps the model able: without it, answers become less probable together.
        objective=PreferenceObjective(kind="preference", loss="dpo", sft_weight=1.0),
        data=DataSection(
            train=(DataSource(manifest=PAIRS),),
            validation=(
                DataSource(manifest=PAIRS, split="validation"),
                DataSource(manifest=QUESTIONS, split="validation"),
            ),
            row_tokens=1024,
        ),
        optim=OptimSection(lr=1e-4),
        schedule=ScheduleSection(
            steps=100, batch_tokens=8192, warmup_steps=10, final_lr_ratio=0.1, eval_every=50
        ),
        cluster=ClusterSection(nproc=2),
    )
