"""What is looked at before a run starts: layout, data, disk, devices; each fails with one sentence."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

from lab_utils.errors import DataError, LayoutError, RecipeError, RunError
from lab_utils.recipe import Recipe
from lab_utils.registry import members, nearest

GIB = 2**30
# Logs, metrics, W&B's files and an executed notebook.
SMALL_FILES = 256 * 2**20


def check_data(recipe: Recipe) -> str:
    """Every manifest that the recipe names is there and its files are what it says; says which.

    Raises:
        DataError: the first problem, and how many more there are.
    """
    from lab_utils.data.manifest import load_manifest

    check_formats(recipe)
    used: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for source in (*recipe.data.train, *recipe.data.validation):
        used.setdefault((source.manifest, source.families), set()).add(source.split)
    for (name, families), splits in used.items():
        manifest = load_manifest(name).only(families)
        for split in splits:
            manifest.source(split)
        # Only what the run reads: a set may have other splits, which may be large or not be here.
        used_part = manifest.model_copy(update={"splits": {s: manifest.splits[s] for s in sorted(splits)}})
        problems = used_part.verify()
        if problems:
            more = f" ({len(problems) - 1} more: lab data verify {name})" if len(problems) > 1 else ""
            raise DataError(f"{problems[0].message.rstrip('.')}{more}.")
    splits = ", ".join(f"{name} ({', '.join(sorted(splits))})" for (name, _), splits in used.items())
    return f"Checksums and rows as the manifests say: {splits}."


def check_formats(recipe: Recipe) -> None:
    """What is trained on has something to learn from for the objective; read from manifests alone.

    Raises:
        DataError: no such manifest or split, or another format.
    """
    from lab_utils.data.manifest import load_manifest

    pairs = recipe.objective.kind in ("preference", "reward")
    # Prompts are looked at with what samples them (check_rollouts).
    formats = None if recipe.rollout else ("preference",) if pairs else ("messages", "text")
    for source in recipe.data.train:
        manifest = load_manifest(source.manifest)
        manifest.source(source.split)
        if formats and manifest.format not in formats:
            raise DataError(
                f"{manifest.name} has format {manifest.format}, but objective.kind={recipe.objective.kind} learns from "
                f"{' or '.join(formats)}: choose another manifest (lab data list)."
            )


def check_model(recipe: Recipe) -> None:
    """The model has what the layout cuts: layers for the stages, experts for the ranks of an ep group, rows long enough
    for the ranks that share them.

    Its configuration is read only where the recipe cuts the model: that takes transformers, and a second or two.

    Raises:
        LayoutError: fewer layers than stages, experts that ep doesn't divide, rows that are too short, a model that
            can't be cut.
    """
    parallel, source = recipe.parallel, recipe.model.source
    stages = parallel.pp * parallel.virtual_stages
    if stages == 1 and parallel.ep == 1 and parallel.cp == 1:
        return
    from lab_utils.models.deepseek_v4.counting import check_parts
    from lab_utils.models.load import load_config

    config = load_config(source)
    if config.model_type != "deepseek_v4":
        raise LayoutError(
            f"{source} is no DeepSeek-V4, and others are trained under data parallelism alone: set parallel.cp, "
            "parallel.ep, parallel.pp and parallel.virtual_stages to 1."
        )
    if stages > config.num_hidden_layers:
        raise LayoutError(
            f"parallel.pp × parallel.virtual_stages = {stages} stages, but the model has {config.num_hidden_layers} "
            f"layers: use at most {config.num_hidden_layers}."
        )
    if config.n_routed_experts % parallel.ep:
        raise LayoutError(
            f"parallel.ep={parallel.ep} does not divide the model's {config.n_routed_experts} experts: use a divisor "
            f"of {config.n_routed_experts}."
        )
    check_parts(config, recipe.data.row_tokens, parallel.cp)


def check_sources(recipe: Recipe) -> None:
    """Every folder of weights that the recipe names is there: those to start from, a reference's, the teachers'.

    Models of the hub are left to the machine that runs.

    Raises:
        RecipeError: an unknown preset or shipped model, or no such folder; the key is named.
        CheckpointError: a folder without a usable config.json.
    """
    from lab_utils.models.load import checkpoint_folder, read_config
    from lab_utils.models.presets import preset, presets

    objective = recipe.objective
    named = {"model.source": recipe.model.source}
    named["objective.reference_source"] = getattr(objective, "reference_source", None)
    for number, teacher in enumerate(getattr(objective, "teachers", ())):
        named[f"objective.teachers.{number}.source"] = teacher.source
    for key, source in named.items():
        if source is None or source.startswith("hf:"):
            continue
        try:
            if not source.startswith("preset:"):
                read_config(checkpoint_folder(source))
            elif source.removeprefix("preset:") not in presets():
                preset(source.removeprefix("preset:"))
        except RecipeError as error:
            raise RecipeError(str(error).replace("model.source", key, 1)) from None


def parameters_of(folder: Path) -> int | None:
    """Values in the safetensors files of ``folder``, from their headers; None where there are none."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        except (OSError, ValueError):
            return None
        total += sum(math.prod(t["shape"]) for key, t in header.items() if key != "__metadata__")
    return total or None


def disk_needed(recipe: Recipe) -> tuple[int, int]:
    """Bytes that the run will write at its fullest, and those of one checkpoint (0 where that isn't known).

    A checkpoint holds the weights in the working precision, AdamW's two fp32 moments and, below fp32, the
    master weights. One more than ``keep_last`` exists while the newest is being written.
    """
    source = recipe.model.source
    if source.startswith("base:"):
        folder = Path(__file__).resolve().parents[1] / "models" / "shipped" / source.removeprefix("base:")
    else:
        folder = Path(source)
    parameters = parameters_of(folder) if folder.is_dir() else None
    if parameters is None:
        return SMALL_FILES, 0
    checkpoint = parameters * (12 if recipe.model.dtype == "float32" else 14)
    saves = math.ceil(recipe.schedule.steps / recipe.schedule.save_every) if recipe.schedule.save_every else 1
    return SMALL_FILES + checkpoint * (min(saves, recipe.schedule.keep_last) + 1), checkpoint


def check_disk(recipe: Recipe, root: Path) -> str:
    """The file system of ``root`` has room for the run; says how much.

    Raises:
        RunError: it has not; the message gives both numbers.
    """
    free = shutil.disk_usage(existing(root)).free
    needed, checkpoint = disk_needed(recipe)
    if free < needed:
        part = f", {checkpoint / GIB:.2f} GiB a checkpoint" if checkpoint else ""
        raise RunError(
            f"{root} has {free / GIB:.2f} GiB free and the run needs about {needed / GIB:.2f} GiB{part}: "
            f"free some space, point ASCENT_RUNS elsewhere, or lower schedule.keep_last."
        )
    besides = "" if checkpoint else " besides checkpoints"
    return f"{free / GIB:.1f} GiB free, about {needed / GIB:.2f} GiB needed{besides}."


def device_kind(recipe: Recipe) -> str:
    """The kind of device that the recipe will use on this machine, from its drivers alone, without torch.

    Raises:
        LayoutError: ``ASCENT_ACCELERATOR`` names no kind of device.
    """
    from lab_utils.telemetry.chips import PROBES, count

    wanted = os.environ.get("ASCENT_ACCELERATOR") or recipe.cluster.accelerator
    if wanted != "auto":
        if wanted not in members(PROBES):
            hint = nearest(wanted, ["auto", *members(PROBES)])
            raise LayoutError(f"There is no accelerator '{wanted}' (ASCENT_ACCELERATOR): {hint.rstrip('.')}.")
        return wanted
    return next((kind for kind in ("npu", "cuda") if count(kind)), "cpu")


def check_accelerator(recipe: Recipe) -> None:
    """The devices asked for by name are on this machine, one for each rank. ``auto`` is left to the engine.

    Raises:
        LayoutError: none of the kind, or fewer than ranks.
    """
    from lab_utils.telemetry.chips import count

    kind, nproc = device_kind(recipe), recipe.cluster.nproc
    named = "auto" not in (recipe.cluster.accelerator, os.environ.get("ASCENT_ACCELERATOR"))
    if kind == "cpu" or not named:
        return
    chips = count(kind)
    if chips == 0:
        raise LayoutError(
            f"cluster.accelerator is '{kind}', but no {kind} device is visible on this machine: "
            f"run it where there is one, or set cluster.accelerator=auto."
        )
    if nproc > chips:
        raise LayoutError(
            f"cluster.nproc={nproc} asks for {nproc} {kind} devices but {chips} are visible here: "
            f"set cluster.nproc={chips}, or make more of them visible."
        )


def check_rollouts(recipe: Recipe) -> None:
    """Samples can be taken under the layout, the data are prompts, and every reward is there with its options.

    Raises:
        LayoutError: prompts that the ranks can't share.
        RecipeError: an unknown reward or option; a record of the sampling that a server doesn't give.
        DataError: data of another format than prompt.
    """
    rollout, objective = recipe.rollout, recipe.objective
    if rollout is None:
        return
    dp, updates = recipe.layout()[0], objective.updates_per_rollout
    if rollout.prompts % (dp * updates):
        raise LayoutError(
            f"rollout.prompts={rollout.prompts} cannot be shared evenly by {dp} data-parallel ranks and "
            f"objective.updates_per_rollout={updates}: use a multiple of {dp * updates}."
        )
    if rollout.source == "server":
        records = {
            "objective.keep_routing": getattr(objective, "keep_routing", False),
            "rollout.keep_sampling_mask": objective.kind == "grpo"
            and rollout.keep_sampling_mask
            and (rollout.top_p < 1 or rollout.top_k > 0),
        }
        for key in (key for key, wanted in records.items() if wanted):
            raise RecipeError(
                f"{key} needs a record of the sampling that no server gives: set it to false, or sample in process "
                "(rollout.source=in_process)."
            )
    if objective.kind == "grpo":
        from lab_utils.rollouts.rewards import load_rewards

        load_rewards(objective.rewards, ask=lambda prompts: ["" for _ in prompts])
    from lab_utils.data.manifest import load_manifest

    for source in (*recipe.data.train, *recipe.data.validation):
        manifest = load_manifest(source.manifest)
        if manifest.format != "prompt":
            raise DataError(
                f"{manifest.name} has format {manifest.format}, but objective.kind={objective.kind} samples and is "
                "evaluated on prompts: choose another manifest (lab data list)."
            )


def preflight(recipe: Recipe, root: Path) -> None:
    """All checks of ``checklist.py``, the cheapest first.

    Raises:
        LabError: the first thing that would keep the run from starting.
    """
    from lab_utils.runs.checklist import checks_of

    for _, check in checks_of(recipe, root):
        check()


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return place
