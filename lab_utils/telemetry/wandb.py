"""W&B as a sink: offline by default, with every file of it inside the run directory.

What is set here and why:

* a base URL, always: W&B's default server has changed its name before, and offline nothing may call out;
* data, cache and configuration below ``<run>/wandb``, since table and artifact records hold absolute paths;
* the transaction log flushed every second instead of 15: a killed process keeps almost all of its steps;
* the step as a metric of its own, since W&B's counter restarts at 0 in an offline resume;
* one id for a run's whole life, and leave to resume it: ``lab wandb sync`` joins the pieces of a resumed run, each
  going on where the one before ended;
* an NPU-Exporter, where one answers: W&B reads it itself, one endpoint name a chip, so that the keys are stable.

Sync is a deliberate act on the login node: ``lab wandb sync RUN --url SERVER``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

from lab_utils.runs.directory import write_atomic
from lab_utils.telemetry import jsonl

ADDRESS = Path("wandb") / "address"  # in a run: where the server shows it
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens
MAX_SAMPLES = 1000  # newest rows of samples.jsonl that make the table
MAX_FILES = 64  # of a manifest that are listed one by one


def environment(run_dir: Path, tracking: Any) -> dict[str, str]:
    """Variables for a training process (and its launch script) that keep W&B inside ``run_dir``.

    Args:
        run_dir: the run directory; ``wandb/`` appears in it.
        tracking: ``recipe.tracking``.
    """
    below = Path(run_dir).resolve() / "wandb"
    return {
        "WANDB_MODE": tracking.wandb,
        "WANDB_BASE_URL": tracking.base_url or NOWHERE,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DIR": str(below.parent),
        "WANDB_DATA_DIR": str(below / "data"),
        "WANDB_CACHE_DIR": str(below / "cache"),
        "WANDB_CONFIG_DIR": str(below / "config"),
        "WANDB_ARTIFACT_DIR": str(below / "artifacts"),
        "WANDB_DISABLE_CODE": "true",
        "WANDB_SILENT": "true",
    }


def run_id(name: str) -> str:
    """W&B's id of a run: made from its name, so that a resumed run has the same one."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def config_of(recipe: Any, provenance: dict[str, Any]) -> dict[str, Any]:
    """What W&B keeps beside the curves: the recipe, where the run came from (no diff, no package list), its data."""
    told = {key: value for key, value in provenance.items() if key not in ("packages", "data", "resumed")}
    told["git"] = {k: v for k, v in (provenance.get("git") or {}).items() if k not in ("diff", "untracked")}
    return {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.hash,
        "provenance": told,
        "manifests": [_manifest(name, found) for name, found in (provenance.get("data") or {}).items()],
    }


def _manifest(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Name, version and hashes of a data set; of very many files one hash over all of theirs."""
    hashes = found.get("sha256") or {}
    lines = [f"{hashes[path]}  {path}" for path in sorted(hashes)]
    together = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    known = {key: found[key] for key in ("version", "revision") if found.get(key)}
    files = {"files": lines} if len(lines) <= MAX_FILES else {}
    return {"name": name, **known, "sha256": together, **files}


def scores(run_dir: Path) -> dict[str, float]:
    """The headline numbers of ``report.json``: ``report/<measure>``, and ``report/base/<measure>`` before training."""
    try:
        report = json.loads((Path(run_dir) / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = {}
    for prefix, side in (("report", report), ("report/base", report.get("base") or {})):
        for key, measure in side.items():
            if isinstance(measure, dict) and isinstance(measure.get("value"), int | float):
                found[f"{prefix}/{key}"] = float(measure["value"])
    return found


def samples(run_dir: Path) -> tuple[list[str], list[list[Any]], int]:
    """Columns and rows of the newest samples, and the last step they are of; what is no text or number as JSON."""
    newest = deque(jsonl.read(Path(run_dir) / "samples.jsonl"), maxlen=MAX_SAMPLES)
    columns = list(dict.fromkeys(key for row in newest for key in row))

    def cell(value: Any) -> Any:
        plain = value is None or isinstance(value, str | int | float)
        return value if plain else json.dumps(value, ensure_ascii=False)

    step = max((int(row.get("step") or 0) for row in newest), default=0)
    return columns, [[cell(row.get(column)) for column in columns] for row in newest], step


class WandbSink:
    """One W&B run a node: group = the run's name, job type ``node-<k>``; node 0 carries training metrics."""

    def __init__(self, node: int = 0):
        self.node = node
        self._run: Any = None
        self._step = 0

    def open(self, run_dir: Path, recipe: Any, provenance: dict[str, Any]) -> None:
        run_dir = Path(run_dir).resolve()
        variables = environment(run_dir, recipe.tracking)
        os.environ.update(variables)
        for key in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            Path(variables[key]).mkdir(parents=True, exist_ok=True)
        import wandb

        self._dir, self._online = run_dir, recipe.tracking.wandb == "online"
        self._run = wandb.init(
            project=recipe.tracking.project,
            entity=recipe.tracking.entity,
            name=run_dir.name if self.node == 0 else f"{run_dir.name} node {self.node}",
            id=run_id(f"{run_dir.name}/node-{self.node}"),
            group=run_dir.name,
            job_type=f"node-{self.node}",
            dir=str(run_dir),
            resume="allow",
            config=config_of(recipe, provenance),
            settings=wandb.Settings(
                mode=recipe.tracking.wandb,
                base_url=variables["WANDB_BASE_URL"],
                x_transaction_log_flush_interval=1.0,
                # The machine's metadata service is asked otherwise, at a link-local address.
                x_stats_coreweave_metadata_base_url=NOWHERE,
                x_stats_pid=os.getpid(),
                console="off",  # the ranks' own logs are in logs/
                disable_git=True,  # provenance.json has commit and diff
                save_code=False,
                init_timeout=60.0,
                **open_metrics((provenance.get("accelerator") or {}).get("kind")),
            ),
        )
        if self.node == 0 and self._run.url:  # only the server knows the entity of a key
            write_atomic(run_dir / ADDRESS, self._run.url)
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._step = step
        self._run.log({"train/global_step": step, **values})

    def event(self, kind: str, message: str) -> None:
        self._run.summary[f"event/{kind}"] = message
        if self._online and kind.startswith("alert_"):
            self._run.alert(title=f"{self._dir.name}: {kind.removeprefix('alert_')}", text=message)

    def close(self, state: str) -> None:
        if self._run is None:
            return
        if self.node == 0:
            self._add_results()
        self._run.summary["state"] = state
        # A stopped run is whole as far as it went; only a failure is one for W&B too.
        self._run.finish(exit_code=0 if state in ("succeeded", "stopped") else 1)
        self._run = None

    def _add_results(self) -> None:
        """Scores and samples, as far as the run has any yet."""
        import wandb

        for key, value in scores(self._dir).items():
            self._run.summary[key] = value
        columns, rows, step = samples(self._dir)
        if rows:
            table = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
            self._run.log({"samples": table, "train/global_step": max(step, self._step)})


def open_metrics(kind: str | None) -> dict[str, Any]:
    """W&B's settings for an NPU-Exporter, one endpoint name a chip: ``openmetrics.npu3.npu_chip_info_power.0``.

    Args:
        kind: the accelerator's; another than npu has an exporter only where the environment names one.
    """
    from lab_utils.telemetry.probes import _exporter

    if kind != "npu" and not os.environ.get(_exporter.VARIABLE):
        return {}
    try:
        url = _exporter.endpoint()
        chips = [reading.more["chip"] for reading in _exporter.read(url)] if url else []
    except (OSError, RuntimeError, ValueError) as error:
        print(f"warning: W&B gets no chip series: {error}; the run goes on.", file=sys.stderr, flush=True)
        return {}
    if not chips:
        return {}
    return {
        "x_stats_open_metrics_endpoints": {f"npu{chip}": url for chip in chips},
        "x_stats_open_metrics_filters": {
            f"npu{chip}.{_exporter.PREFIX}.*": {"id": f"^{chip}$"} for chip in chips
        },
    }


def amend(run_dir: Path) -> None:
    """Another offline piece of an ended run: the scores and samples that came after its own W&B run was closed."""
    from lab_utils.runs.directory import RunDirectory

    directory = RunDirectory(run_dir)
    recipe = directory.recipe.with_changes({"tracking.wandb": "offline"})
    sink = WandbSink()
    sink.open(directory.path, recipe, directory.provenance)
    sink.close(str(directory.status.get("state") or "failed"))


if __name__ == "__main__":
    amend(Path(sys.argv[1]))
