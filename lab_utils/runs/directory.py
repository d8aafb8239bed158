"""The run directory: all state of a run in files that survive any process.

Small files are written by rename and never seen half; logs of rows are appended and read with a torn last
line. Several processes write ``status.json`` (supervisor, rank 0, whoever stops the run): a lock beside it
keeps their changes apart.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from lab_utils.errors import RunError
from lab_utils.recipe import Recipe
from lab_utils.runs.states import transition
from lab_utils.telemetry import jsonl

Action = Literal["stop", "checkpoint_and_stop"]
_STAMP = re.compile(r"-(\d{8}-\d{6})-[0-9a-f]{6}$")


def default_root() -> Path:
    """Where runs live: the environment's ``ASCENT_RUNS``, else ``./runs``."""
    return Path(os.environ.get("ASCENT_RUNS") or "runs")


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Write by rename: a reader sees the old file or the new one, whatever happens in between."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; {} where there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class RunDirectory:
    """One run's folder.

    Args:
        path: the folder; it must exist, its files may not.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()

    def __repr__(self) -> str:
        return f"RunDirectory({self.path})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def logs(self) -> Path:
        folder = self.path / "logs"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe.

        Raises:
            RunError: this folder has none, so it is no run.
            RecipeError: it was written by another version, and a key means nothing here.
        """
        if not (self.path / "recipe.yaml").is_file():
            raise RunError(f"{self.path} has no recipe.yaml, so it is no run directory: check the path.")
        return Recipe.load(self.path / "recipe.yaml")

    def replace_recipe(self, recipe: Recipe) -> None:
        """Another recipe for the same run, as when it goes on under another layout; its place among runs stays."""
        path = self.path / "recipe.yaml"
        written = path.stat()
        write_atomic(path, recipe.to_yaml())
        os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))

    def remove(self) -> None:
        """Take the directory away: at once for every reader, then file by file.

        Raises:
            RunError: it belongs to somebody else, or the file system refuses.
        """
        going = self.path.with_name(f".deleted-{self.path.name}-{os.getpid()}")
        try:
            self.path.rename(going)
            shutil.rmtree(going)
        except OSError as error:
            where = going if going.exists() else self.path
            raise RunError(f"{where} cannot be removed ({error.strerror or error}): ask its owner.") from None

    # -- status ----------------------------------------------------------------------------------------

    @property
    def status(self) -> dict[str, Any]:
        """status.json as it stands, {} where missing or damaged; ``runs.api`` concludes ``lost`` from it."""
        return read_json(self.path / "status.json")

    def write_status(self, **changes: Any) -> dict[str, Any]:
        """Change some keys of status.json; the heartbeat is set to now unless it is among them.

        Returns:
            The whole status after the change.

        Raises:
            RunError: ``state`` is among the changes and there is no way to it from the present state.
        """
        with self._lock():
            status = self.status
            now = time.time()
            if "state" in changes:
                changes["state"] = transition(status.get("state"), changes["state"])
                if changes["state"] == "running":
                    changes.setdefault("started", status.get("started") or now)
            status.update({"heartbeat": now, **changes})
            # A state must survive a power cut; a heartbeat need not, and comes too often to force to the
            # disk.
            write_atomic(
                self.path / "status.json",
                json.dumps(status, indent=1, default=str),
                durable="state" in changes,
            )
        return status

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.path / ".status.lock").open("a") as stream:
            # Some network file systems have no locks: then the last writer wins, still by rename.
            with contextlib.suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    # -- control ---------------------------------------------------------------------------------------

    @property
    def control(self) -> dict[str, Any]:
        """What the worker is asked to do: {"action": "stop" | "checkpoint_and_stop" | None, "by": …, "time": …}."""
        return {"action": None, **read_json(self.path / "control.json")}

    def request(self, action: Action | None, by: str = "user") -> None:
        """Ask the worker for something at its next step; None takes an earlier request back.

        A stop that a scheduler asks for (``by="scheduler"``) is no end of the run: the job is queued again.
        """
        asked = {"action": action, "by": by, "time": time.time()}
        write_atomic(self.path / "control.json", json.dumps(asked))

    # -- rows, checkpoints -----------------------------------------------------------------------------

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a line to a .jsonl file of the run."""
        jsonl.append(self.path / name, row)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Every whole line of a .jsonl file of the run; [] where there is none."""
        return list(jsonl.read(self.path / name))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p.parent for p in self.path.glob("checkpoints/step-*/COMPLETE"))

    @property
    def provenance(self) -> dict[str, Any]:
        return read_json(self.path / "provenance.json")


# -- making and finding --------------------------------------------------------------------------------


def create(recipe: Recipe, root: str | Path | None = None) -> RunDirectory:
    """A new folder ``<name>-<yyyymmdd-hhmmss>-<hash6>`` with the recipe in it, in state ``created``.

    Two launches of one recipe in the same second get two folders: ``mkdir`` decides, and the later one takes
    the next free second.

    Raises:
        RunError: the root cannot be written.
    """
    root = Path(root) if root is not None else default_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            path = root / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{recipe.hash[:6]}"
            try:
                path.mkdir()
                break
            except FileExistsError:
                time.sleep(0.05)
    except OSError as error:
        raise RunError(
            f"No run can be made in {root} ({error.strerror or error}): choose another folder by ASCENT_RUNS."
        ) from None
    run = RunDirectory(path)
    write_atomic(path / "recipe.yaml", recipe.to_yaml())
    (path / "logs").mkdir()
    run.write_status(
        state="created",
        created=time.time(),
        step=0,
        total_steps=recipe.schedule.steps,
        host=socket.gethostname(),
        error=None,
    )
    return run


def all_runs(root: str | Path | None = None) -> list[RunDirectory]:
    """Runs below ``root``, oldest first; folders that are no runs are passed over."""
    root = Path(root) if root is not None else default_root()
    found = [RunDirectory(path.parent) for path in root.glob("*/recipe.yaml")]
    return sorted(found, key=age)


def age(run: RunDirectory) -> tuple[str, str]:
    """Sorts by the second in the name, which a copy keeps; a renamed run by the time of its recipe."""
    match = _STAMP.search(run.name)
    if match:
        return match.group(1), run.name
    written = time.localtime((run.path / "recipe.yaml").stat().st_mtime)
    return time.strftime("%Y%m%d-%H%M%S", written), run.name


def find(run: str | Path, root: str | Path | None = None) -> RunDirectory:
    """The run meant by a name, a unique prefix of one, a path, or ``last``.

    Raises:
        RunError: none or several fit; the message names the nearest.
    """
    root = Path(root) if root is not None else default_root()
    text = str(run)
    direct = Path(text).expanduser()
    if (direct / "recipe.yaml").is_file():
        return RunDirectory(direct)
    if direct.is_absolute() or len(direct.parts) > 1:
        raise RunError(
            f"{text} is no run directory (it has no recipe.yaml): check the path, or see lab runs list."
        )
    known = all_runs(root)
    if not known:
        raise RunError(
            f"There are no runs in {root}: start one with lab run RECIPE, or set ASCENT_RUNS to their folder."
        )
    if text == "last":
        return known[-1]
    names = [r.name for r in known]
    fitting = [r for r in known if r.name == text] or [r for r in known if text and r.name.startswith(text)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        shown = ", ".join(r.name for r in fitting[-3:])
        raise RunError(
            f"'{text}' fits {len(fitting)} runs in {root} ({shown}): give more of the name, or last."
        )
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.3) or names[-1:]
    raise RunError(f"There is no run '{text}' in {root}: nearest are {', '.join(near)} (lab runs list).")
