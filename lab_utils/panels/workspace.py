"""The dashboard of W&B, made from the same list of panels that draws the figures and the live view.

    lab wandb workspace                                   # the layout as JSON, nothing is sent
    lab wandb workspace --save --entity team --url https://wandb.example.org

Panels and their order are those of ``panels/layout.py``, units those of ``telemetry/names.py``. A share is drawn as it
is logged, 0–1: W&B's charts have no factor.
"""

from __future__ import annotations

import json
import os
from typing import Any

from lab_utils.errors import RunError
from lab_utils.panels.layout import OVERVIEW, PANELS, SECTIONS, Panel, panels
from lab_utils.telemetry.names import lookup
from lab_utils.telemetry.wandb import NOWHERE

NAME = "Ascent"
STEP = "train/global_step"
SMOOTHING = 0.6
# Shares among the scores of report.json; WandbSink writes them as report/<measure>.
SCORES = (
    "exact_match",
    "pass_at_k",
    "refusal_rate",
    "over_refusal_rate",
    "preference_accuracy",
    "reward_accuracy",
)


def build(project: str, entity: str | None = None, name: str = NAME) -> Any:
    """The ``wandb_workspaces.workspaces.Workspace``: a section for each of ``SECTIONS``, in their order; offline."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(
            name=section,
            panels=_section(section),
            is_open=section in ("Overview", "Alignment"),
            layout_settings=ws.SectionLayoutSettings(columns=3, rows=3 if section == "Overview" else 2),
            panel_settings=ws.SectionPanelSettings(x_axis=STEP),
        )
        for section in SECTIONS
    ]
    return ws.Workspace(
        entity=entity or "",
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP, group_by_prefix="first", max_runs=20),
        auto_generate_panels=False,
    )


def _section(section: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    if section == "Overview":
        by_title = {panel.title: panel for panel in PANELS}
        return [_chart(by_title[title]) for title in OVERVIEW]
    charts = [_chart(panel) for panel in panels(section)]
    if section == "Rollouts":
        charts.append(wr.WeavePanelSummaryTable(table_name="samples"))
    if section == "Evaluation":
        keys = [f"report/{side}{score}" for score in SCORES for side in ("base/", "")]
        charts.append(wr.BarPlot(title="Held-out scores, before and after", metrics=keys, orientation="h"))
    return charts


def _chart(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    spec = lookup(panel.keys[0])
    smooth = panel.kind in ("line", "log")
    return wr.LinePlot(
        title=panel.title,
        x=STEP,
        y=list(panel.keys),
        log_y=panel.kind == "log",
        title_x="step",
        title_y=panel.unit if panel.scale == 1 or spec is None else spec.unit,
        plot_type="stacked-area" if panel.kind == "area" else "line",
        smoothing_type="exponentialTimeWeighted" if smooth else "none",
        smoothing_factor=SMOOTHING if smooth else 0,
        smoothing_show_original=smooth,
    )


def as_json(workspace: Any) -> dict[str, Any]:
    """The workspace as W&B stores it, without the ids that are drawn anew each time."""

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: plain(value) for key, value in node.items() if key != "__id__"}
        return [plain(value) for value in node] if isinstance(node, list) else node

    # The library has no public way to its JSON: a test holds this one.
    return plain(json.loads(workspace._to_model().model_dump_json(by_alias=True)))


def save(project: str, entity: str | None, url: str | None, name: str = NAME) -> str:
    """Put the workspace on a server; returns its address.

    Raises:
        RunError: no server, team or key is named, or the server refuses.
    """
    url = (url or os.environ.get("WANDB_BASE_URL") or "").rstrip("/")
    if not url or url == NOWHERE:
        raise RunError("--save sends the workspace to a W&B server and none is named: give --url.")
    if not entity:
        raise RunError(f"--save needs the team or user at {url} that the workspace is for: give --entity.")
    from lab_utils.telemetry.wandb_server import check

    check(url)
    os.environ["WANDB_BASE_URL"] = url
    os.environ.pop("WANDB_MODE", None)
    try:
        return build(project, entity, name).save().url
    except Exception as error:  # the library raises whatever its transport does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"{url} did not take the workspace ({reason}): check --entity, --project and the key."
        ) from None
