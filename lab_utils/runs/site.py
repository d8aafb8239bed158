"""What no program can detect of a cluster: its fabric, its cabinets. One YAML file for a site, named by ASCENT_SITE.

    name: hall 2
    machine: Atlas 900 A3 SuperPoD
    fabric: HCCS inside a SuperPoD, RoCE between them
    storage: parallel file system, 400 GB/s
    cabinets: {A01: ["npu-00[1-8]"], A02: ["npu-009", "npu-01[0-6]"]}    # names of nodes, with * and [ ]
    superpods: {P1: ["npu-0*"]}

Every key may be absent. It is copied into the provenance of each run that is launched under it, and shown by the run
card, which counts the cabinets and SuperPoDs that a run's nodes stand in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from lab_utils.errors import RecipeError
from lab_utils.recipe.base import Section


class Site(Section):
    """A site's description; see the module's head."""

    name: str | None = Field(None, description="What its people call it.")
    machine: str | None = Field(None, description="Product of the cluster.")
    fabric: str | None = Field(None, description="How chips and nodes are connected.")
    storage: str | None = Field(None, description="The shared file system.")
    cabinets: dict[str, tuple[str, ...]] = Field({}, description="Cabinet: patterns of node names.")
    superpods: dict[str, tuple[str, ...]] = Field({}, description="SuperPoD: patterns of node names.")


def read(path: str | Path) -> Site:
    """The description in a YAML file.

    Raises:
        RecipeError: no such file, not YAML, or a key that is unknown or of a wrong kind.
    """
    try:
        return Site.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {})
    except OSError as error:
        reason = error.strerror or str(error)
    except (yaml.YAMLError, UnicodeDecodeError):
        reason = "not valid YAML"
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    known = ", ".join(Site.model_fields)
    raise RecipeError(f"{path} (ASCENT_SITE): {reason}; a site's keys are {known}.") from None


def of_environment() -> dict[str, Any] | None:
    """What ``ASCENT_SITE`` says, for provenance; None where it isn't set, ``{"problem": ...}`` where it can't be read:
    a run doesn't fail for that (``lab doctor`` says it)."""
    path = os.environ.get("ASCENT_SITE")
    try:
        return read(path).model_dump(mode="json", exclude_defaults=True) if path else None
    except RecipeError as error:
        return {"problem": str(error)}


def places(groups: dict[str, Iterable[str]], nodes: Iterable[str]) -> list[str] | None:
    """Which of ``groups`` (name: patterns) hold the nodes, sorted; None where a node is in none of them.

    A node's domain doesn't count: ``npu-001.hall`` is ``npu-001``.
    """
    found = set()
    for node in nodes:
        names = (node, node.split(".")[0])
        home = next(
            (g for g, patterns in groups.items() if any(fnmatch(n, p) for p in patterns for n in names)), None
        )
        if home is None:
            return None
        found.add(home)
    return sorted(found) or None
