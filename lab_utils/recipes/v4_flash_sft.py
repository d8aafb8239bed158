"""All 284B weights of DeepSeek-V4-Flash on 128 Ascend 910C, Muon, 4K rows: set model.source to its weights."""

from lab_utils.recipe import (
    ClusterSection,
    DataSection,
    DataSource,
    ModelSection,
    OptimSection,
    ParallelSection,
    Recipe,
    ScheduleSection,
)


def recipe() -> Recipe:
    return Recipe(
        name="v4_flash_sft",
        model=ModelSection(
            source="preset:flash",
            dtype="bfloat16",
            checkpointing="attention",
            mtp_loss=0.1,
            balance_loss=1e-4,
        ),
        data=DataSection(train=(DataSource(manifest="tulu-3-sft-mixture"),), row_tokens=4096),
        # TR §4.2.2, but for the rate: none is published for fine-tuning; others' trials take 1e-5.
        optim=OptimSection(kind="muon", lr=1e-5, eps=1e-20, weight_decay=0.1),
        # Of the fastest that lab plan v4_flash_sft --cluster ascend-910c finds, alike to 5 %, one that leaves a
        # tenth of the memory; docs/planner.md.
        parallel=ParallelSection(cp=2, ep=32, pp=8),
        schedule=ScheduleSection(
            steps=1500,
            batch_tokens=2048 * 4096,
            micro_rows=1,
            warmup_steps=50,
            shape="cosine",
            save_every=100,
        ),
        cluster=ClusterSection(accelerator="npu", launcher="slurm", nodes=16, nproc=16),
    )
