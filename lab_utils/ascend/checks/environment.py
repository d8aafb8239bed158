"""Launch scripts for NPUs: what they set is of a form that CANN takes, and torch_npu reads what is meant for it."""

from __future__ import annotations

from collections.abc import Iterator

ORDER = 15
PROVES = {
    "scripts": "the scripts of every launcher give a node an environment without contradictions, each variable with "
    "its reason",
    "read": "torch_npu's own libraries and modules know every variable that is meant for torch_npu",
}
JOBS = {
    "local": {"cluster.nproc": 16},
    "slurm": {
        "cluster.nproc": 16,
        "cluster.nodes": 128,
        "cluster.options": {"gres": "npu:16", "profile": "ascend-910c"},
    },
    "volcano": {
        "cluster.nproc": 16,
        "cluster.nodes": 128,
        "cluster.options": {
            "image": "registry.example/ascent:1",
            "accelerator_type": "module-a3-16-super-pod",
        },
    },
}


def run() -> Iterator[tuple[str, bool, str]]:
    import tempfile
    from pathlib import Path

    from lab_utils.ascend import environment, wheel
    from lab_utils.ascend.environment import SMOKE_STEPS
    from lab_utils.recipe import Recipe

    wrong, names = [], set()
    with tempfile.TemporaryDirectory() as folder:
        for launcher, changes in JOBS.items():
            npu = {"cluster.launcher": launcher, "cluster.accelerator": "npu", "schedule.steps": SMOKE_STEPS}
            npu |= {"schedule.batch_tokens": 1 << 21, **changes}
            recipe = Recipe.load("sft_tiny").with_changes(npu)
            wanted = environment.variables(recipe, "/logs")
            names |= {v.name for v in wanted if v.read_by == "torch_npu" and v.value is not None}
            script = rendered(launcher, recipe, Path(folder) / launcher)
            given = environment_of(script, {v.name for v in wanted})
            wrong += [f"{launcher}: {p.found}: {p.advice}" for p in environment.problems(given)]
            wrong += [
                f"{launcher}: no reason for {v.name}" for v in wanted if f"# {v.reason} [" not in script
            ]
            wrong += [
                f"{launcher}: {v.name} is {given.get(v.name)}, not {v.value}"
                for v in wanted
                if v.name != "ASCEND_PROCESS_LOG_PATH" and given.get(v.name) != v.value
            ]
    yield "scripts", not wrong, "; ".join(wrong[:3]) if wrong else f"{', '.join(JOBS)}, by bash itself"
    unread = sorted(names - read_by_torch_npu(wheel.required()))
    yield (
        "read",
        not unread,
        f"unknown to torch_npu: {', '.join(unread)}" if unread else ", ".join(sorted(names)),
    )


def rendered(launcher: str, recipe, folder) -> str:
    """The script of a launcher; of a Kubernetes object, its container's."""
    import yaml

    from lab_utils.launchers._base import get_launcher
    from lab_utils.runs.directory import RunDirectory

    folder.mkdir(parents=True)
    text = get_launcher(launcher).render(RunDirectory(folder), recipe)
    if launcher != "volcano":
        return text
    return yaml.safe_load(text)["spec"]["replicaSpecs"]["Master"]["template"]["spec"]["containers"][0][
        "args"
    ][0]


def environment_of(script: str, names: set[str]) -> dict[str, str]:
    """Variables after the lines of a script that set these, as bash makes them; nothing else of it runs."""
    import os
    import re
    import subprocess

    setting = re.compile(r"\b(?:export|unset) (\w+)")
    body = [line for line in script.splitlines() if (found := setting.search(line)) and found[1] in names]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(["run=/run", *body, "env -0"])],
        env={
            "PATH": os.environ["PATH"],
            "RANK_TABLE_FILE": "/old.json",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)


def read_by_torch_npu(place) -> set[str]:
    """Names of variables that stand as whole strings in torch_npu's libraries, or quoted in its Python."""
    import re

    from lab_utils.ascend import elf, wheel

    found = set()
    for file in wheel.libraries(place):
        found |= elf.texts(file, rb"[A-Z][A-Z0-9_]{5,50}")
    for file in (place / "torch_npu").rglob("*.py"):
        found |= set(re.findall(r"[\"']([A-Z][A-Z0-9_]{5,50})[\"']", file.read_text(errors="replace")))
    return found
