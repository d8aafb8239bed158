"""W&B as a sink: offline by default, with every file of it inside the run directory.

What is set here and why:

* a base URL, always: W&B's default server has changed its name before, and offline nothing may call out;
* data, cache and configuration below ``<run>/wandb``, since table and artifact records hold absolute paths;
* the transaction log flushed every second instead of 15: a killed process keeps almost all of its steps;
* the step as a metric of its own, since W&B's counter restarts at 0 in an offline resume;
* one id for a run's whole life: the pieces of a resumed run join into one when they are synced.

Sync is a deliberate act on the login node: ``wandb sync --yes RUN/wandb/offline-run-*``.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


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


class WandbSink:
    """One W&B run a node: group = the run's name, job type ``node-<k>``; node 0 carries training metrics."""

    def __init__(self, node: int = 0):
        self.node = node
        self._run: Any = None

    def open(self, run_dir: Path, recipe: Any, provenance: dict[str, Any]) -> None:
        run_dir = Path(run_dir).resolve()
        variables = environment(run_dir, recipe.tracking)
        os.environ.update(variables)
        for key in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            Path(variables[key]).mkdir(parents=True, exist_ok=True)
        import wandb

        self._run = wandb.init(
            project=recipe.tracking.project,
            entity=recipe.tracking.entity,
            name=run_dir.name,
            id=run_id(f"{run_dir.name}/node-{self.node}"),
            group=run_dir.name,
            job_type=f"node-{self.node}",
            dir=str(run_dir),
            resume="allow" if recipe.tracking.wandb == "online" else None,
            config={
                "recipe": recipe.model_dump(mode="json"),
                "recipe_hash": recipe.hash,
                "provenance": {
                    key: value for key, value in provenance.items() if key not in ("diff", "packages")
                },
            },
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
            ),
        )
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"train/global_step": step, **values})

    def event(self, kind: str, message: str) -> None:
        self._run.summary[f"event/{kind}"] = message

    def close(self, state: str) -> None:
        if self._run is not None:
            self._run.summary["state"] = state
            # A stopped run is whole as far as it went; only a failure is one for W&B too.
            self._run.finish(exit_code=0 if state in ("succeeded", "stopped") else 1)
            self._run = None
