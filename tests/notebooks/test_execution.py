"""Notebooks run the way a user runs them; bad parameters are refused before a kernel starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lab_utils.errors import RecipeError, RunError
from lab_utils.panels import notebooks

ALL = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_notebooks_are_clean_thin_and_parametrised(path):
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert max(len(cell.source.splitlines()) for cell in code) <= 30
    assert "metadata" not in book or "papermill" not in book.metadata


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-p", "steps", "007"], {"steps": 7}),
        (["-p", "lr", "1e-4"], {"lr": 1e-4}),
        (["-p", "name", "a b", "-p", "none", "null"], {"name": "a b", "none": None}),
    ],
)
def test_parameters_are_read_as_values(words, expected):
    assert notebooks.parse_parameters(words) == expected


def test_an_unknown_parameter_or_notebook_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match="no parameter 'stepz': did you mean 'steps'"):
        notebooks.execute("10_sft", {"stepz": 3}, root=Path("unused"))
    with pytest.raises(RunError, match="did you mean '10_sft'"):
        notebooks.find_notebook("10_sf")
    with pytest.raises(RecipeError, match="-p NAME VALUE"):
        notebooks.parse_parameters(["steps=3"])


def test_a_failing_cell_is_one_sentence_and_its_copy_is_kept(tmp_path):
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_code_cell("x = 1"),
        nbformat.v4.new_code_cell("raise ValueError('no such thing')"),
    ]
    book.cells[0].metadata["tags"] = ["parameters"]
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "broken.ipynb"
    nbformat.write(book, path)
    with pytest.raises(
        RunError, match=r"broken\.ipynb: cell .* failed with ValueError: no such thing"
    ) as error:
        notebooks.execute(str(path), {"x": 2}, root=tmp_path / "runs", progress=False)
    copy = Path(str(error.value).rpartition("up to there: ")[2].rstrip(")"))
    assert json.loads(copy.read_text())["cells"]


@pytest.mark.slow
def test_the_tour_ends_with_a_panel(tmp_path):
    done = notebooks.execute("00_tour", {"rows": 2, "row_tokens": 384}, root=tmp_path, progress=False)
    run = Path(done["runs"][0])
    assert Path(done["notebook"]).parent == run and (run / "00_tour.html").exists()
    text = Path(done["notebook"]).read_text()
    assert "image/png" in text


@pytest.mark.slow
def test_fine_tuning_runs_from_parameters_to_export(tmp_path):
    done = notebooks.execute(
        "10_sft", {"steps": 6, "questions": 24, "nproc": 2}, root=tmp_path, progress=False
    )
    run = Path(done["runs"][0])
    report = json.loads((run / "report.json").read_text())
    assert report["exact_match"]["n"] == report["base"]["exact_match"]["n"] == 24
    assert (run / "samples.html").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "succeeded"
    assert (run / "export" / "model.safetensors").exists() or list(
        (run / "export").glob("model-*.safetensors")
    )
    assert json.loads((run / "provenance.json").read_text())["notebook"]


# The alignment notebooks on the base model, side by side: what counts here is that every cell runs.
SMALL = {
    "20_preference": {"loss": "simpo", "steps": 2},
    "30_grpo": {"steps": 2, "prompts": 4},
    "40_distill": {"steps": 2, "prompts": 4, "specialist_steps": 2},
}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """The last run of each notebook."""
    started = {}
    for name, parameters in SMALL.items():
        root = tmp_path_factory.mktemp(name)
        given = {"start": "base:tiny", "nproc": 1, "questions": 8, **parameters}
        words = [word for key, value in given.items() for word in ("-p", key, str(value))]
        started[name] = (
            root,
            subprocess.Popen(
                [Path(sys.executable).with_name("lab"), "notebook", name, *words, "--json"],
                env={**os.environ, "ASCENT_RUNS": str(root), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ),
        )
    found = {}
    for name, (_, process) in started.items():
        out, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]
        found[name] = json.loads(out)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first one waits for all three
@pytest.mark.parametrize("name", SMALL)
def test_alignment_runs_from_parameters_to_before_and_after(aligned, name):
    done = aligned[name]
    run = Path(done["runs"][-1])
    assert json.loads((run / "status.json").read_text())["state"] == "succeeded"
    report = json.loads((run / "report.json").read_text())
    assert report["exact_match"]["n"] == report["base"]["exact_match"]["n"] == 8
    assert (run / "samples.html").exists()
    assert Path(done["notebook"]).parent.parent == run.parent
    assert Path(done["notebook"]).read_text().count("image/png") >= 2
    assert len(done["runs"]) == (3 if name == "40_distill" else 1)


@pytest.mark.parametrize("deaths, comes_up", [(1, True), (3, False)])
def test_a_kernel_that_dies_before_its_first_cell_is_started_again(tmp_path, monkeypatch, deaths, comes_up):
    import papermill

    tried = []

    def execute(path, executed, **options):
        tried.append(path)
        if len(tried) <= deaths:
            raise RuntimeError("Kernel died before replying to kernel_info")
        Path(executed).write_text(Path(path).read_text())

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    if comes_up:
        assert Path(notebooks.execute("00_tour", {}, root=tmp_path)["notebook"]).exists() and len(tried) == 2
    else:
        with pytest.raises(RunError, match="its kernel died 3 times before the first cell"):
            notebooks.execute("00_tour", {}, root=tmp_path)
