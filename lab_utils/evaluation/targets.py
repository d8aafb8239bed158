"""Whose weights are meant by a name: a run, one of its checkpoints, a model folder, or a source of a recipe.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab_utils.errors import CheckpointError, RunError
from lab_utils.models.load import checkpoint_folder
from lab_utils.runs.directory import RunDirectory, find

if TYPE_CHECKING:
    from lab_utils.data.documents import Encoding
    from lab_utils.recipe import Recipe
    from lab_utils.runs.api import Run

PREFIXES = ("base:", "preset:", "hf:")


@dataclass(frozen=True)
class Target:
    """Weights to evaluate.

    Attributes:
        name: as a reader of the report should see it.
        source: as ``load_model`` takes it.
        run: directory of the run that they belong to, or start; it says how questions are encoded.
        checkpoint: name of the run's checkpoint; absent: weights of no run, or those before its training.
        seed: of random weights (``preset:``).
    """

    name: str
    source: str
    run: str | None = None
    checkpoint: str | None = None
    seed: int = 0

    def base(self) -> Target | None:
        """The weights that this one's run started from; None for weights of no run."""
        if not self.run or not self.checkpoint:
            return None
        recipe = RunDirectory(self.run).recipe
        return Target(recipe.model.source, recipe.model.source, self.run, seed=recipe.seed)

    def folder(self) -> Path | None:
        """Where its report belongs: the run, a folder in it for an earlier checkpoint, None for weights of no run."""
        if not self.run or not self.checkpoint:
            return None
        latest = RunDirectory(self.run).checkpoints()
        if latest and latest[-1].name == self.checkpoint:
            return Path(self.run)
        return Path(self.run) / "evaluations" / self.checkpoint

    def encoding(self) -> Encoding:
        """How rows become tokens for it: as its run says, else with the tokenizer beside the weights."""
        from lab_utils.data.documents import Encoding, encoding_of
        from lab_utils.data.tokenizer import load_tokenizer
        from lab_utils.models.load import load_tokenizer_path

        if self.run:
            return encoding_of(RunDirectory(self.run).recipe)
        return Encoding(load_tokenizer(load_tokenizer_path(self.source)))


def resolve(text: str | Path) -> Target:
    """The weights meant by a run's name, prefix or path, ``last``, a checkpoint or model folder, or a source.

    Raises:
        RunError: none or several runs fit; a run without a complete checkpoint; a folder that is none of these.
        CheckpointError: a checkpoint that is not complete.
        RecipeError: a source that does not exist.
    """
    text = str(text)
    if text.startswith(PREFIXES):
        if not text.startswith("preset:"):
            checkpoint_folder(text)
        return Target(text, text)
    path = Path(text).expanduser()
    if (path / "config.json").is_file():  # first: a shipped model has its recipe beside it
        if path.name == "model" and _run_of(path.parent):
            return _of_checkpoint(path.parent)
        return Target(path.name, str(path.resolve()))
    if (path / "recipe.yaml").is_file():
        return _of_run(RunDirectory(path))
    if _run_of(path):
        return _of_checkpoint(path)
    if path.is_absolute() or len(path.parts) > 1:
        raise RunError(
            f"{text} is no run (recipe.yaml), checkpoint of a run (step-…) or model folder (config.json): check the "
            "path, or see lab runs list."
        )
    return _of_run(find(text))


def weights_of(name: Run | str | Path | None, otherwise: Recipe | str = "sft_tiny") -> str:
    """Weights to start from, as ``model.source`` takes them.

    Args:
        name: a run, or whatever ``resolve`` takes. None: a finished run of the recipe ``otherwise``, which is made
            where there is none.

    Raises:
        LabError: as ``resolve`` and ``runs.api.finished``.
    """
    if name is None:
        from lab_utils.runs.api import finished

        return str(finished(otherwise).weights)
    text = str(getattr(name, "path", name))
    # Sources are looked up where the run starts: a cluster may have other models than this machine.
    return text if text.startswith(PREFIXES) else resolve(text).source


def _run_of(checkpoint: Path) -> Path | None:
    """The run whose ``checkpoints/step-…`` this folder is."""
    path = checkpoint.resolve()
    is_one = path.is_dir() and path.name.startswith("step-") and path.parent.name == "checkpoints"
    return path.parents[1] if is_one and (path.parents[1] / "recipe.yaml").is_file() else None


def _of_run(run: RunDirectory) -> Target:
    checkpoints = run.checkpoints()
    if not checkpoints:
        raise RunError(
            f"{run.name} has no complete checkpoint to evaluate: let it save one (schedule.save_every)."
        )
    return Target(run.name, str(checkpoints[-1] / "model"), str(run.path), checkpoints[-1].name)


def _of_checkpoint(path: Path) -> Target:
    path = path.resolve()
    run = RunDirectory(path.parents[1])
    if not (path / "COMPLETE").exists():
        done = ", ".join(p.name for p in run.checkpoints()) or "none"
        raise CheckpointError(
            f"{path} is not complete (it has no file COMPLETE): evaluate one that is (complete: {done})."
        )
    return Target(f"{run.name} · {path.name}", str(path / "model"), str(run.path), path.name)
