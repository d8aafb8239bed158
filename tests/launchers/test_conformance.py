"""What holds for every launcher: one more file in the folder is tested by these, too."""

import inspect
import subprocess

import pytest
import yaml

from lab_utils.errors import LabError, RecipeError
from lab_utils.launchers import _base
from lab_utils.launchers._base import JobInfo, Launcher, get_launcher, options_class, options_of, preview
from lab_utils.registry import members
from lab_utils.runs.api import Run
from lab_utils.runs.states import JobState

NAMES = members(_base.MEMBERS)
FUNCTIONS = ("render", "submit", "status", "describe", "stop", "logs", "check")


def test_the_launchers_are_there_and_nothing_else_is_taken_for_one():
    assert NAMES == ["local", "slurm", "volcano"]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def launcher(name):
    return get_launcher(name)


@pytest.fixture
def recipe(recipe, name):
    """A recipe for this launcher, with an example for each setting that it can't do without."""
    kind = options_class(name)
    fields = kind.model_fields if kind else {}
    needed = {key: field.examples[0] for key, field in fields.items() if field.is_required()}
    return recipe.with_changes({"cluster.launcher": name, "cluster.options": needed})


def scripts(text: str) -> list[str]:
    """The bash in what a launcher renders: a script, or what the containers of a manifest run."""
    if text.startswith("#!"):
        return [text]
    found, rest = [], [yaml.safe_load(text)]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            found += node.get("args", [])
            rest += node.values()
        elif isinstance(node, list):
            rest += node
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_has_the_functions_of_the_protocol(launcher, function):
    wanted = list(inspect.signature(getattr(Launcher, function)).parameters.values())[1:]
    found = list(inspect.signature(getattr(launcher, function)).parameters.values())
    assert [(p.name, p.default) for p in found[: len(wanted)]] == [(p.name, p.default) for p in wanted]


def test_rendering_says_all_in_plain_bash_and_does_nothing(launcher, run_dir, recipe):
    before = sorted(p.name for p in run_dir.path.rglob("*"))
    text = launcher.render(run_dir, recipe)
    assert text == launcher.render(run_dir, recipe)
    assert sorted(p.name for p in run_dir.path.rglob("*")) == before and run_dir.status["state"] == "created"
    assert str(run_dir.path) in text and any(run_dir.name in line for line in text.splitlines()[:2])
    assert scripts(text)
    for script in scripts(text):
        assert "torch.distributed.run" in script and "lab_utils.launchers._rank" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_preview_is_what_would_be_submitted_and_makes_nothing(recipe, tmp_path):
    text = preview(recipe, tmp_path / "none yet")
    assert str(tmp_path / "none yet" / recipe.name) in text and not (tmp_path / "none yet").exists()


def test_every_setting_says_what_it_means(name):
    kind = options_class(name)
    for key, field in (kind.model_fields if kind else {}).items():
        assert field.description and field.description.endswith("."), key
        assert not field.is_required() or field.examples, f"{key} is needed: give an example"


def test_a_setting_that_it_does_not_have_is_refused_by_name(recipe, name):
    with pytest.raises(RecipeError, match=r"cluster\.options.*sett") as caught:
        options_of(recipe.with_changes({"cluster.options.sett": ["true"]}))
    text = str(caught.value)
    assert f"the launcher '{name}'" in text and "\n" not in text
    assert "did you mean 'setup'" in text or not options_class(name)


def test_what_keeps_a_job_from_starting_is_one_sentence(launcher, recipe, tmp_path, monkeypatch):
    """More nodes than this machine, commands that it hasn't got, no volume for the runs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError) as caught:
        launcher.check(recipe.with_changes({"cluster.nodes": 2}), tmp_path)
    text = str(caught.value)
    assert "cluster." in text and "\n" not in text and text.endswith((".", "?"))


def test_a_job_that_was_never_submitted_is_not_running(launcher, run_dir):
    assert launcher.status(run_dir) == JobState.GONE
    assert launcher.describe(run_dir) == JobInfo(JobState.GONE)


def test_a_job_that_cannot_be_asked_for_is_no_error(launcher, name, run_dir, recipe, tmp_path, monkeypatch):
    """The scheduler's commands are missing here, or the run was started on another machine."""
    run_dir.replace_recipe(recipe)
    run_dir.write_status(state="running", launcher=name, job="4711", host="another-machine")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher.status(run_dir) == JobState.UNKNOWN
    info = Run(run_dir).job()
    assert info.state == JobState.UNKNOWN and info.detail
    assert Run(run_dir).state == "running", "not lost before ten minutes without a sign of life"


def test_what_is_known_of_a_job_is_said_in_words():
    waiting = JobInfo(JobState.PENDING, "Priority: others are before it", position=3, restarts=1)
    assert waiting.words() == {
        "waits": "place 3 in the queue; Priority: others are before it",
        "restarts": "1",
    }
    running = JobInfo(JobState.RUNNING, seconds_left=5400.0, nodes=tuple(f"n{i}" for i in range(6)))
    assert running.words() == {"time left": "1.5 h", "nodes": "n0, n1, n2, n3 and 2 more"}
    assert JobInfo(JobState.GONE).words() == {}


def test_stopping_leaves_the_request_in_the_run_directory(launcher, run_dir):
    launcher.stop(run_dir, checkpoint=True)
    assert run_dir.control["action"] == "checkpoint_and_stop" and run_dir.control["by"] == "user"
    launcher.stop(run_dir, checkpoint=False)
    assert run_dir.control["action"] == "stop"


def test_logs_are_the_ends_of_files_and_empty_without_any(launcher, run_dir):
    assert launcher.logs(run_dir) == ""
    (run_dir.logs / "rank-10.log").write_text("ten\n")
    (run_dir.logs / "rank-2.log").write_text("".join(f"line {i}\n" for i in range(1000)))
    (run_dir.logs / "node-1.log").write_text("from a node\n")
    text = launcher.logs(run_dir, 3)
    assert text.splitlines() == [
        "==> node-1.log <==",
        "from a node",
        "==> rank-2.log <==",
        "line 997",
        "line 998",
        "line 999",
        "==> rank-10.log <==",
        "ten",
    ]
    assert launcher.logs(run_dir, 1, rank=10) == "ten"


def test_an_unknown_launcher_is_answered_with_the_known_ones():
    with pytest.raises(RecipeError, match="local, slurm, volcano"):
        get_launcher("slurmm")
