"""Where a run ran and how to run it again: layout, hardware, software, the command."""

from __future__ import annotations

import hashlib
import shlex
from typing import Any

from lab_utils.recipe import Recipe
from lab_utils.runs.directory import RunDirectory
from lab_utils.runs.site import places

# Those whose version decides what is computed; the others are in the JSON too.
MAIN_PACKAGES = (
    "torch",
    "torch-npu",
    "torch_npu",
    "colossalai",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
)


def layout(recipe: Recipe, provenance: dict[str, Any], attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """Degrees and micro-batches of the last attempt; ``earlier`` has those of attempts under another layout."""
    given = {
        **{
            key: getattr(recipe.parallel, key)
            for key in ("cp", "ep", "pp", "virtual_stages", "zero", "offload")
        },
        **(provenance.get("layout") or {}),
    }
    told = [{"ranks": each.get("ranks"), **(each.get("layout") or {})} for each in attempts] or [given]
    earlier = [each for each in told[:-1] if each != told[-1]]
    checkpointing, dtype = recipe.model.checkpointing, recipe.model.dtype
    return {
        **told[-1],
        "batch_tokens": recipe.schedule.batch_tokens,
        "row_tokens": recipe.data.row_tokens,
        "activation_checkpointing": checkpointing,
        "dtype": dtype,
        "earlier": earlier,
    }


def hardware(
    recipe: Recipe, provenance: dict[str, Any], attempts: list[dict[str, Any]], status: dict[str, Any]
) -> dict[str, Any]:
    """Chips, nodes and what a site's description adds of cabinets and fabric; None where nothing says it."""
    last = attempts[-1] if attempts else {}
    nodes = list(dict.fromkeys(name for each in attempts for name in each.get("nodes") or ()))
    launcher = status.get("launcher") or recipe.cluster.launcher
    if not nodes and launcher == "local" and status.get("host"):
        nodes = [status["host"]]
    ranks = last.get("ranks") or status.get("world_size") or (provenance.get("layout") or {}).get("ranks")
    named = None if recipe.cluster.accelerator == "auto" else recipe.cluster.accelerator
    kind, device = last.get("kind") or named, last.get("device")
    on_cpu = kind == "cpu"
    site = provenance.get("site") or {}
    dies = bool(device and str(device).startswith("Ascend910_93"))
    return {
        "kind": kind,
        "device": device,
        "device_gib": last.get("device_gib"),
        "chips": None if kind is None else 0 if on_cpu else ranks,
        "packages": -(-ranks // 2) if dies and ranks else None,  # 910C: two dies a package, each a device
        "ranks": ranks,
        "nodes": len(nodes) or None,
        "node_names": nodes,
        "ranks_per_node": ranks // len(last.get("nodes") or nodes) if ranks and nodes else None,
        "cabinets": places(site.get("cabinets") or {}, nodes),
        "superpods": places(site.get("superpods") or {}, nodes),
        "fabric": site.get("fabric"),
        "machine": site.get("machine"),
        "storage": site.get("storage"),
        "site": site.get("name"),
        "peak_flops": last.get("peak_flops"),
        "peak_source": last.get("peak_source"),
        "host_platform": provenance.get("platform"),
        "host_cores": last.get("host_cores") or provenance.get("cores"),
        "launched_from": provenance.get("host"),
        "launcher": launcher,
        "job": status.get("job"),
        "options": recipe.cluster.options,
        "environment": last.get("environment"),
    }


def software(provenance: dict[str, Any], attempts: list[dict[str, Any]]) -> dict[str, Any]:
    last = attempts[-1] if attempts else {}
    packages = provenance.get("packages") or None
    code = provenance.get("git") or {}
    return {
        "python": provenance.get("python"),
        "cann": last.get("cann"),
        "driver": last.get("driver"),
        "main": {name: packages[name] for name in MAIN_PACKAGES if name in packages} if packages else None,
        "packages": packages,
        "packages_sha256": _digest(packages) if packages else None,
        "lock_sha256": provenance.get("lock_sha256"),
        "commit": code.get("commit"),
        "branch": code.get("branch"),
        "dirty": code.get("dirty"),
        "untracked": len(code["untracked"]) if isinstance(code.get("untracked"), list) else None,
        "diff_lines": len(code["diff"].splitlines()) if isinstance(code.get("diff"), str) else None,
    }


def _digest(packages: dict[str, str]) -> str:
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(packages.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def reproduce(run: RunDirectory, recipe: Recipe, provenance: dict[str, Any]) -> dict[str, Any]:
    """The command, and everything that has to be equal for it to give the same."""
    code = provenance.get("git") or {}
    text = (run.path / "recipe.yaml").read_text(encoding="utf-8")
    commands = []
    if code.get("commit"):
        changed = bool(code.get("diff"))
        commands += [f"lab card {run.name} --diff > changes.diff"] if changed else []
        commands += [f"git checkout {code['commit']}"] + (["git apply changes.diff"] if changed else [])
    commands.append("make setup")
    command = f"lab run {shlex.quote(str(run.path / 'recipe.yaml'))}"
    return {
        "command": command,
        "commands": [*commands, command],
        # As it was launched: a later version of the code may know more keys.
        "recipe_hash": provenance.get("recipe_hash") or recipe.hash,
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seed": recipe.seed,
        "commit": code.get("commit"),
        "dirty": code.get("dirty"),
        "lock_sha256": provenance.get("lock_sha256"),
        "working_folder": provenance.get("cwd"),
        "notebook": provenance.get("notebook"),
        "recipe": text,
    }
