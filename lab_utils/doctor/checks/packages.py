"""Every pinned package against its pin."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

from lab_utils.doctor._machine import Machine, Row

ORDER = 11
PROJECT = "ascent-lab"
# Installed without its own requirements, so that no metadata names it; the engine cannot do without it.
ENGINE = "colossalai"
_PIN = re.compile(r"^\s*([A-Za-z0-9._-]+)\s*==\s*([^\s;]+)")
SOURCE = Path(__file__).resolve().parents[3]


def pins() -> dict[str, str]:
    """Package and version as the project pins them: by its pyproject.toml, and without the source tree by the metadata
    of the installed package."""
    file = SOURCE / "pyproject.toml"
    if file.is_file():
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
        lines = [*tree["project"]["dependencies"], *tree["dependency-groups"]["engine"]]
    else:
        lines = [line for line in importlib.metadata.requires(PROJECT) or () if "extra ==" not in line]
    return {match[1]: match[2] for line in lines if (match := _PIN.match(line))}


def installed(name: str) -> str | None:
    """Version of a package without a build's local part (``2.13.0+cpu``); None where it isn't there."""
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def check(machine: Machine) -> list[Row]:
    try:
        wanted = pins()
    except importlib.metadata.PackageNotFoundError:
        return [
            Row("packages", False, f"{PROJECT} is not installed", "Install it: pip install --no-deps -e .")
        ]
    # torch_npu decides for its torch: environment.yml takes an earlier pair than the pins, and `torch_npu` checks it.
    if installed("torch_npu"):
        wanted.pop("torch", None)
    there = {name: installed(name) for name in [*wanted, ENGINE]}
    wrong = {
        name: version
        for name, version in there.items()
        if version is None or version != wanted.get(name, version)
    }
    rows = []
    for name, version in wrong.items():
        pin = f"{name}=={wanted[name]}" if name in wanted else name
        advice = f"pip install --no-deps {pin}, or make setup for the whole locked set."
        rows.append(
            Row(f"package {name}", False, f"{version or 'missing'}, pinned {wanted.get(name, '-')}", advice)
        )
    found = f"{len(there) - len(wrong)} of {len(there)} as pinned"
    return [Row("packages", not rows, found, "See the lines below." if rows else ""), *rows]
