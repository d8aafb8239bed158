"""Launch, follow, stop and resume runs; what the notebook, the command line and the widgets share.

    run = launch(Recipe.load("sft_tiny"))
    run.wait()                    # a bar; interrupting it leaves the run alone
    run.metrics()["train/loss"]   # a DataFrame indexed by step
    attach("last").stop()         # in another kernel, after a checkpoint

Nothing here holds a device or imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.errors import RunError
from lab_utils.launchers._base import JobInfo, Launcher, get_launcher
from lab_utils.planner.auto import chosen
from lab_utils.recipe import Recipe
from lab_utils.runs import notes, provenance
from lab_utils.runs.checks import preflight
from lab_utils.runs.directory import RunDirectory, all_runs, create, default_root, find
from lab_utils.runs.states import FINAL, JobState, derive
from lab_utils.runs.steps import merge_steps
from lab_utils.runs.waiting import wait_for

if TYPE_CHECKING:
    import pandas as pd

# What of a recipe may change when a run is resumed: how and where it runs.
RESUMABLE = (
    "parallel.",
    "cluster.",
    "tracking.",
    "model.checkpointing",
    "schedule.micro_rows",
    "schedule.save_every",
    "schedule.keep_last",
    "schedule.async_save",
)


class Run:
    """A run, wherever it was started; made by ``launch``, ``attach`` and ``list_runs``."""

    def __init__(self, directory: RunDirectory):
        self.directory = directory

    def __repr__(self) -> str:
        status = self.status
        return f"<Run {self.name}: {status['state']}, step {status['step']} of {status['total_steps']}>"

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def path(self) -> Path:
        return self.directory.path

    @property
    def recipe(self) -> Recipe:
        return self.directory.recipe

    @property
    def launcher(self) -> Launcher:
        return get_launcher(self.directory.status.get("launcher") or self.recipe.cluster.launcher)

    @property
    def weights(self) -> Path:
        """Folder of the newest checkpoint's weights, as ``model.source`` takes it.

        Raises:
            RunError: there is no checkpoint yet.
        """
        found = self.directory.checkpoints()
        if not found:
            raise RunError(
                f"{self.name} has no checkpoint yet: let it save one (schedule.save_every), or go on to its end."
            )
        return found[-1] / "model"

    # -- where it stands -------------------------------------------------------------------------------

    @property
    def status(self) -> dict[str, Any]:
        """``state``, ``step``, ``total_steps``, ``heartbeat``, ``job``, ``error`` … as of now.

        ``state`` is ``lost`` (or ``failed``, where a rank left its reason) for a run whose heartbeat is old
        and whose job the launcher doesn't know; that is concluded on reading and not written.
        """
        status = {"step": 0, "total_steps": 0, "error": None, **self.directory.status}
        stored = status.get("state")
        # Asking for a job costs more than reading a file: only where the answer matters.
        open_ended = stored not in FINAL and stored is not None
        job = self.launcher.status(self.directory) if open_ended else JobState.GONE
        status["state"] = derive(stored, status.get("heartbeat"), time.time(), job)
        if status["state"] == "lost" and stored != "lost":
            status |= self._why_lost(status)
        return status

    def _why_lost(self, status: dict[str, Any]) -> dict[str, Any]:
        from lab_utils.launchers._failure import rank_reports

        if reports := rank_reports(
            self.directory.logs, status.get("started") or status.get("created") or 0.0
        ):
            return {"state": "failed", "error": reports[0]["error"], "failed_rank": reports[0]["rank"]}
        if not status.get("heartbeat"):
            return {"error": f"status.json of {self.name} cannot be read: lab runs resume {self.name}."}
        age = max(time.time() - status["heartbeat"], 0)
        return {
            "error": f"No sign of life for {age:.0f} s and no job: its processes were ended from outside; "
            f"lab runs resume {self.name} goes on from the last checkpoint."
        }

    @property
    def state(self) -> str:
        return self.status["state"]

    def metrics(self) -> pd.DataFrame:
        """Everything logged, a row a step, columns as in docs/metrics.md.

        A resumed run logs the steps after its checkpoint again: the later lines replace the earlier ones, and
        what an abandoned attempt had logged beyond them is left out.
        """
        import pandas as pd

        table = merge_steps(self.directory.rows("metrics.jsonl"))
        frame = pd.DataFrame.from_dict(table, orient="index")
        frame.index = pd.Index(frame.index, name="step", dtype="int64")
        return frame.apply(pd.to_numeric, errors="coerce").sort_index()

    def summary(self) -> dict[str, Any]:
        """What ``lab runs show --json`` prints: run, path, state, step, metrics (last values) and more."""
        status = self.status
        last: dict[str, Any] = {}
        for _, values in sorted(merge_steps(self.directory.rows("metrics.jsonl")).items()):
            last |= values
        last.pop("time", None)
        recipe = self.recipe
        return {
            "run": self.name,
            "path": str(self.path),
            "state": status["state"],
            "step": status["step"],
            "total_steps": status["total_steps"],
            "metrics": last,
            "error": status["error"],
            "recipe": recipe.name,
            "recipe_hash": recipe.hash,
            "ranks": status.get("world_size") or recipe.cluster.world_size,
            "launcher": status.get("launcher"),
            "job": status.get("job"),
            "created": status.get("created"),
            "started": status.get("started"),
            "finished": status.get("finished"),
            "checkpoints": [path.name for path in self.directory.checkpoints()],
        }

    def job(self) -> JobInfo:
        """What the launcher knows of the job: state, why it waits, place in the queue, seconds left, restarts, nodes.

        Answers of a scheduler are some seconds old: it is asked seldom, and for all runs at once.
        """
        return self.launcher.describe(self.directory)

    # -- what people write at it -----------------------------------------------------------------------

    @property
    def notes(self) -> str:
        """A free text; set it: ``run.notes = "diverged after the change of rate"``."""
        return notes.read(self.path).text

    @notes.setter
    def notes(self, text: str) -> None:
        notes.change(self.path, text=text)

    @property
    def tags(self) -> tuple[str, ...]:
        """Words to find it by; set them: ``run.tags = ["baseline", "v2"]``."""
        return notes.read(self.path).tags

    @tags.setter
    def tags(self, tags: Iterable[str] | str) -> None:
        notes.change(self.path, tags=tags)

    def fork(self, changes: dict[str, Any] | None = None, *, weights: bool = False) -> Recipe:
        """This run's recipe with changes, for a run of its own: ``launch(run.fork({"optim.lr": 1e-3}))``.

        Args:
            changes: dotted keys, any of them.
            weights: start from this run's newest checkpoint instead of from where it started.

        Raises:
            RunError: ``weights`` of a run without a checkpoint.
            RecipeError: a change that is none.
        """
        start = {"model.source": str(self.weights)} if weights else {}
        return self.recipe.with_changes({**start, **(changes or {})})

    def delete(self) -> None:
        """Remove the directory with everything in it: checkpoints, logs, metrics.

        Raises:
            RunError: it goes on, or may not be removed.
        """
        status = self.status
        if status["state"] not in FINAL and status["state"] != "created":
            raise RunError(f"{self.name} is {status['state']}: stop it first (lab runs stop {self.name}).")
        self.directory.remove()

    # -- logs --------------------------------------------------------------------------------------------

    def logs(self, n: int = 50, rank: int | None = None) -> str:
        """The last ``n`` lines of every log, or of one rank's."""
        return self.launcher.logs(self.directory, n, rank)

    # -- following -------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None, progress: bool = True) -> Run:
        """Return when the run has ended; show a bar (or, in a log file, a line now and then) until then.

        Interrupting this call, or a timeout, leaves the run alone.

        Raises:
            RunError: the run failed or was lost (with ``progress`` the end of its log is printed first), or
                still goes on after ``timeout`` seconds.
        """
        return wait_for(self, timeout, progress)

    # -- steering --------------------------------------------------------------------------------------

    def stop(self, checkpoint: bool = True, wait: float | None = None) -> Run:
        """Ask the run to end at its next step.

        Args:
            checkpoint: save first, so that ``resume`` loses nothing.
            wait: seconds to wait for the end; absent: as long as it takes; 0: return at once.

        Raises:
            RunError: the run has ended already, or ended badly, or not within ``wait``.
        """
        status = self.status
        if status["state"] in FINAL:
            raise RunError(f"{self.name} has ended already ({status['state']}): there is nothing to stop.")
        self.launcher.stop(self.directory, checkpoint)
        self.directory.append(
            "events.jsonl",
            {"time": time.time(), "kind": "stop_requested", "message": f"checkpoint={checkpoint}"},
        )
        return self if wait == 0 else self.wait(timeout=wait, progress=False)

    def resume(self, changes: dict[str, Any] | None = None) -> Run:
        """Go on from the last complete checkpoint, on the same directory; returns at once.

        Args:
            changes: dotted keys of the recipe that say how and where it runs, not what it computes: another layout,
                more or fewer ranks (see ``RESUMABLE``). The losses go on as they would have.

        Raises:
            RunError: the run still goes on, has done all its steps, or a change would make it another run.
            LabError: what a launch would refuse too: data, disk, devices.
        """
        status = self.status
        if status["state"] not in FINAL and status["state"] != "created":
            raise RunError(
                f"{self.name} is {status['state']}: follow it with lab runs show, or stop it first."
            )
        if status["state"] == "succeeded":
            raise RunError(
                f"{self.name} has done all its {status['total_steps']} steps: to train on, start a new run "
                f"with --set model.source=CHECKPOINT/model, a folder of {self.path}/checkpoints."
            )
        recipe = self.recipe.with_changes(changes or {})
        for key in changes or {}:
            if not f"{key}.".startswith(RESUMABLE):
                raise RunError(
                    f"{key} changes what {self.name} computes, and a resumed run stays what it is: leave it out, or "
                    f"start a new run with --set model.source=CHECKPOINT/model, a folder of {self.path}/checkpoints."
                )
        recipe = chosen(recipe)
        preflight(recipe, self.path.parent)
        if changes:
            self.directory.replace_recipe(recipe)
        if self.directory.status.get("state") not in FINAL:
            self.directory.write_status(state="lost", heartbeat=status.get("heartbeat"))
        provenance.write(self.path, recipe)
        self.directory.request(None)
        _submit(self.directory, recipe)
        return self


def _submit(directory: RunDirectory, recipe: Recipe) -> None:
    directory.write_status(error=None, failed_rank=None, finished=None, exit_code=None, started=None)
    get_launcher(recipe.cluster.launcher).submit(directory, recipe)


def launch(recipe: Recipe | str | Path, *, root: str | Path | None = None, wait: bool = False) -> Run:
    """Choose the layout where ``parallel`` is ``auto``, check everything, make the run directory, start the job.

    Args:
        recipe: a recipe, the name of one, or a YAML file.
        root: folder of runs; absent: ``ASCENT_RUNS``, else ``./runs``.
        wait: return when the run has ended instead of at once.

    Raises:
        LayoutError: ranks, batch and rows do not divide, or there are fewer devices than ranks.
        DataError: a manifest or file is missing or not what it should be.
        RunError: no room on the disk, or the job could not be started.
    """
    recipe = chosen(recipe if isinstance(recipe, Recipe) else Recipe.load(recipe))
    root = Path(root) if root is not None else default_root()
    get_launcher(recipe.cluster.launcher)
    preflight(recipe, root)
    directory = create(recipe, root)
    provenance.write(directory.path, recipe)
    _submit(directory, recipe)
    run = Run(directory)
    return run.wait() if wait else run


def finished(recipe: Recipe | str | Path, *, root: str | Path | None = None) -> Run:
    """A run of this recipe that has succeeded: the newest there is, or one that is launched now and waited for.

    Two recipes are one when their hashes are: when they compute the same.

    Raises:
        LabError: see ``launch`` and ``Run.wait``.
    """
    recipe = chosen(recipe if isinstance(recipe, Recipe) else Recipe.load(recipe))
    for run in list_runs(root):
        if run.recipe.hash == recipe.hash and run.state == "succeeded" and run.directory.checkpoints():
            return run
    return launch(recipe, root=root, wait=True)


def attach(run: str | Path = "last", root: str | Path | None = None) -> Run:
    """A run by name, unique prefix, path, or ``last``, in any process.

    Raises:
        RunError: none or several fit.
    """
    return Run(find(run, root))


def list_runs(root: str | Path | None = None) -> list[Run]:
    """All runs, newest first."""
    return [Run(directory) for directory in reversed(all_runs(root))]
