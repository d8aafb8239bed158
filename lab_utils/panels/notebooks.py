"""Execute a notebook of ``notebooks/`` by papermill, the way CI and ``make demo`` do.

Three of papermill's traps are answered here: an unknown parameter is refused instead of warned about, a notebook
without a ``parameters`` cell is refused, and the executed copy ends up beside the run that it made.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from lab_utils.errors import RecipeError, RunError
from lab_utils.registry import nearest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
KERNEL_TRIES = 3


def find_notebook(name: str) -> Path:
    """``10_sft`` or a path to an .ipynb.

    Raises:
        RunError: there is none of that name; the nearest one is named.
    """
    path = Path(name) if name.endswith(".ipynb") else NOTEBOOKS / f"{name}.ipynb"
    if not path.is_file():
        known = [p.stem for p in NOTEBOOKS.glob("*.ipynb")]
        raise RunError(f"There is no notebook '{name}' in {NOTEBOOKS.name}/: {nearest(name, known)}.")
    return path


def check_parameters(path: Path, given: dict[str, Any]) -> None:
    """Refuse names that the notebook's tagged cell does not define; papermill would only warn.

    Raises:
        RecipeError: an unknown name, or a notebook without a cell tagged ``parameters``.
    """
    import papermill

    known = list(papermill.inspect_notebook(str(path)))
    if not known:
        raise RecipeError(
            f"{path.name} has no cell tagged 'parameters': tag the one that holds its settings."
        )
    for name in given:
        if name not in known:
            raise RecipeError(f"{path.name} has no parameter '{name}': {nearest(name, known)}.")


def execute(name: str, parameters: dict[str, Any], *, root: Path, progress: bool = True) -> dict[str, Any]:
    """Run a notebook to its end in a kernel of its own.

    Args:
        name: as ``find_notebook`` takes it.
        parameters: values for the cell tagged ``parameters``.
        root: the folder of runs; the executed copy lies there until a run adopts it.
        progress: show a bar over cells on standard error.

    Returns:
        ``notebook`` (path of the executed copy), ``runs`` (paths of the runs that it launched), ``seconds``.

    Raises:
        RunError: a cell failed; the message has the cell's error, and where the half-executed copy is. Or no kernel
            came up.
    """
    from papermill.exceptions import PapermillExecutionError

    path = find_notebook(name)
    check_parameters(path, parameters)
    staging = root / "notebooks"
    staging.mkdir(parents=True, exist_ok=True)
    executed = staging / f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.ipynb"
    started, before = time.time(), _launched_by(root, executed)
    environment = {"ASCENT_NOTEBOOK": str(executed.resolve()), "ASCENT_RUNS": str(root.resolve())}
    environment["ASCENT_HEADLESS"] = "1"  # nobody is there, even where a notebook's own kernel runs this
    kept = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    try:
        _execute(path, executed, parameters, progress)
    except PapermillExecutionError as error:
        raise RunError(
            f"{path.name}: cell {error.cell_index} failed with {error.ename}: "
            f"{error.evalue.strip().splitlines()[-1] if error.evalue.strip() else 'no message'} "
            f"(the copy up to there: {executed})"
        ) from None
    finally:
        for key, value in kept.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
    runs = [run for run in _launched_by(root, executed) if run not in before]
    if runs:
        executed = executed.rename(runs[0] / path.name)
        write_html(executed)
    return {"notebook": str(executed), "runs": [str(run) for run in runs], "seconds": time.time() - started}


def _execute(path: Path, executed: Path, parameters: dict[str, Any], progress: bool) -> None:
    """papermill on a fresh kernel. Kernels that start at the same time may draw the same free port, and one of them
    dies before its first cell: then it is tried again.

    Raises:
        RunError: no kernel came up.
    """
    import papermill

    for left in reversed(range(KERNEL_TRIES)):
        try:
            papermill.execute_notebook(
                str(path),
                str(executed),
                parameters=parameters,
                kernel_name="python3",
                language="python",
                progress_bar=progress,
            )
            return
        except RuntimeError as error:  # papermill's own, of a cell, is none
            if "before replying to kernel_info" not in str(error):
                raise
            if not left:
                raise RunError(
                    f"{path.name}: its kernel died {KERNEL_TRIES} times before the first cell ({error}): try "
                    f"`{sys.executable} -m ipykernel_launcher`, which says why."
                ) from None


def _launched_by(root: Path, executed: Path) -> list[Path]:
    """Runs below ``root`` whose provenance names this executed notebook, oldest first."""
    found = []
    for provenance in sorted(root.glob("*/provenance.json"), key=lambda p: p.stat().st_mtime):
        try:
            if json.loads(provenance.read_text()).get("notebook") == str(executed.resolve()):
                found.append(provenance.parent)
        except (OSError, ValueError):
            continue  # a run of somebody else, half written: not ours to judge
    return found


def write_html(notebook: Path) -> Path:
    """The executed notebook as one HTML file beside it, for a reader without Jupyter."""
    import nbformat
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(embed_images=True).from_notebook_node(nbformat.read(notebook, as_version=4))
    target = notebook.with_suffix(".html")
    target.write_text(body, encoding="utf-8")
    return target


def parse_parameters(words: list[str]) -> dict[str, Any]:
    """``["-p", "steps", "20"]`` → ``{"steps": 20}``; values are read as YAML, with ``1e-4`` a number.

    Raises:
        RecipeError: anything but ``-p NAME VALUE`` triples.
    """
    parameters: dict[str, Any] = {}
    rest = list(words)
    while rest:
        if rest[0] not in ("-p", "--parameter") or len(rest) < 3:
            raise RecipeError(f"'{' '.join(rest)}': expected -p NAME VALUE, as in -p steps 50.")
        _, name, text, *rest = rest
        value = yaml.safe_load(text)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML 1.1 reads 1e-4 as text
        parameters[name] = value
    return parameters
