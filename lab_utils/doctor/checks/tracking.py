"""W&B: what a run launched from here would do. Nothing is contacted."""

from __future__ import annotations

from lab_utils.doctor._machine import Machine, Row

ORDER = 50


def check(machine: Machine) -> list[Row]:
    mode = machine.environ.get("WANDB_MODE")
    server = machine.environ.get("WANDB_BASE_URL")
    runs = "runs are offline unless their recipe says tracking.wandb=online"
    if mode in (None, "", "offline", "disabled", "dryrun"):
        return [Row("W&B", True, f"WANDB_MODE {mode or 'is not set'}: {runs}")]
    if not server:
        advice = (
            "Set WANDB_BASE_URL to your own server, or WANDB_MODE=offline: W&B's default server is outside."
        )
        return [Row("W&B", False, f"WANDB_MODE={mode} without WANDB_BASE_URL", advice)]
    return [Row("W&B", True, f"WANDB_MODE={mode}, server {server}; {runs}")]
