"""Figures for a notebook or a report, drawn with seaborn from a run's own files.

Every function returns a matplotlib Figure and closes it in pyplot, so a notebook shows it once. matplotlib and seaborn
take seconds to import and are imported late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab_utils.panels.layout import ALIGNMENT, OVERVIEW, PANELS, Panel

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
SERIES = ("#2f6fde", "#e4572e", "#3aa17e", "#8d6cab", "#c9a227", "#5c6b7a")
BEFORE, AFTER = "#b8c2cc", "#2f6fde"


def _canvas(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(
        context="paper",
        style="whitegrid",
        rc={
            "axes.edgecolor": GRID,
            "grid.color": GRID,
            "axes.labelcolor": MUTED,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "text.color": INK,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
            "axes.labelsize": 8.5,
            "figure.dpi": 110,
            "savefig.dpi": 150,
        },
    )
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    plt.close(figure)
    return figure, axes


def _labels(keys: Sequence[str]) -> list[str]:
    """What tells the lines of one panel apart: `train` and `eval`, or `data` and `optimizer` of `perf/time/…`."""
    heads = [key.partition("/")[0] for key in keys]
    if len(set(heads)) == len(keys) and set(heads) <= {"train", "eval"}:
        return heads
    return [key.rpartition("/")[2].replace("_", " ") for key in keys]


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10 … on a logarithmic axis, as numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_panel(ax: Axes, metrics: pd.DataFrame, panel: Panel) -> None:
    """One panel of the layout on ``ax``; ``metrics`` is ``Run.metrics()``, indexed by step."""
    keys = [key for key in panel.keys if key in metrics and metrics[key].notna().any()]
    ax.set_title(panel.title)
    ax.set_ylabel(panel.unit)
    if not keys:
        ax.text(
            0.5, 0.5, "not logged in this run", ha="center", va="center", transform=ax.transAxes, color=MUTED
        )
        ax.set(xticks=[], yticks=[])
        return
    if panel.kind == "area":
        keys = [key for key in keys if (metrics[key] > 0).any()] or keys[:1]
        filled = metrics[keys].fillna(0.0) * panel.scale
        ax.stackplot(filled.index, filled.T.values, labels=_labels(keys), colors=SERIES, linewidth=0)
    for color, key, label in zip(SERIES, keys, _labels(keys)) if panel.kind != "area" else ():
        series = metrics[key].dropna() * panel.scale
        if key.startswith("eval/"):
            ax.plot(series.index, series, "o-", color=color, markersize=4, label=label)
            continue
        smooth = len(series) > 40 and panel.kind != "exact"
        ax.plot(
            series.index, series, color=color, linewidth=0.8 if smooth else 1.4, alpha=0.3 if smooth else 1.0
        )
        if smooth:
            series = series.ewm(span=max(len(series) // 20, 5)).mean()
        ax.plot(series.index, series, color=color, linewidth=1.6, label=label)
    if panel.kind != "log":
        if (metrics[keys].min() >= 0).all():
            ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
    elif (metrics[keys].min() > 0).all():
        ax.set_yscale("log")
        _plain_ticks(ax.yaxis)
    if len(keys) > 1:
        ax.legend(frameon=False, fontsize=7.5, loc="best")
    ax.margins(x=0.01)
    ax.spines[["top", "right"]].set_visible(False)


def overview(metrics: pd.DataFrame, title: str = "") -> Figure:
    """The page that tells how a run went: loss, accuracy, speed, utilisation, stability.

    Args:
        metrics: ``Run.metrics()``: one row a logged step, columns as in docs/metrics.md.
        title: usually the run's name.
    """
    return _page(OVERVIEW, metrics, title)


def alignment(metrics: pd.DataFrame, kind: str, title: str = "") -> Figure:
    """What a run that learns from preferences, rewards or teachers is steered by.

    Args:
        metrics: ``Run.metrics()``.
        kind: of the objective: preference, grpo or distill.
        title: usually the run's name.
    """
    return _page(ALIGNMENT[kind], metrics, title)


def _page(titles: Sequence[str], metrics: pd.DataFrame, title: str) -> Figure:
    """Panels by their titles, three in a row."""
    chosen = [panel for name in titles for panel in PANELS if panel.title == name]
    rows = len(chosen) // 3
    figure, axes = _canvas(rows, 3, 11, 7.6 / 3 * rows)
    for ax, panel in zip(axes.flat, chosen, strict=True):
        draw_panel(ax, metrics, panel)
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def compared(table: pd.DataFrame, title: str = "") -> Figure:
    """Numbers of several models as a map of shades, the number in each field.

    Args:
        table: a row a family, a column a model.
        title: what the numbers are, with their unit.
    """
    import seaborn as sns

    sheet, axes = _canvas(1, 1, 2.2 + 1.1 * table.shape[1], 1.2 + 0.36 * len(table))
    ax = axes[0, 0]
    sns.heatmap(
        table, annot=True, fmt=".1f", cmap="Blues", vmin=0, vmax=130, cbar=False, linewidths=1.5, ax=ax
    )
    ax.set(title=title, xlabel="", ylabel="")
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelcolor=INK)
    ax.tick_params(axis="y", rotation=0)
    return sheet


def weight_changes(audit: dict) -> Figure:
    """How far each tensor moved, by component: ‖W_after - W_before‖ / ‖W_before‖.

    Args:
        audit: the result of ``lab audit RUN --json``; ``by_tensor`` has ``name`` and ``relative_change``.
    """
    import seaborn as sns

    rows = [
        (component_of(t["name"]), t["relative_change"]) for t in audit["by_tensor"] if t["relative_change"]
    ]
    order = sorted({component for component, _ in rows})
    figure, axes = _canvas(1, 1, 8.5, 0.36 * len(order) + 1.3)
    ax = axes[0, 0]
    sns.stripplot(
        x=[100 * change for _, change in rows],
        y=[component for component, _ in rows],
        order=order,
        ax=ax,
        color=SERIES[0],
        size=5,
        alpha=0.65,
        jitter=0.2,
    )
    ax.set_xscale("log")
    _plain_ticks(ax.xaxis)
    ax.set(xlabel="relative change of a tensor, %", ylabel="")
    ax.set_title(f"Every dot is a weight tensor: {audit['changed']} of {audit['tensors']} changed")
    ax.spines[["top", "right", "left"]].set_visible(False)
    return figure


def component_of(name: str) -> str:
    """The part of a DeepSeek-V4 that a parameter belongs to, from its transformers name."""
    for part, marks in (
        ("indexer", ("indexer",)),
        ("compressor", ("compressor",)),
        ("hyper-connections", ("attn_hc", "ffn_hc", "hc_head")),
        ("routed experts", ("mlp.experts",)),
        ("shared expert", ("shared_experts",)),
        ("router", ("mlp.gate",)),
        ("norms", ("norm",)),
        ("attention", ("self_attn",)),
        ("embedding", ("embed_tokens",)),
        ("head", ("lm_head",)),
    ):
        if any(mark in name for mark in marks):
            return part
    return "other"


def packed_rows(document_ids_BT: Any, loss_weights_BT: Any) -> Figure:
    """Rows as the model sees them: one colour a document, dark where a token bears loss, white padding.

    Args:
        document_ids_BT: integers ``[B, T]``, -1 for padding.
        loss_weights_BT: floats ``[B, T]``, 0 where a token bears no loss.
    """
    import numpy as np
    import seaborn as sns
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    documents, weights = np.asarray(document_ids_BT), np.asarray(loss_weights_BT)
    B, T = documents.shape
    palette = np.array([to_rgb(color) for color in sns.color_palette("husl", 9)])
    image = np.ones((B, T, 3))
    inside = documents >= 0
    image[inside] = palette[(documents[inside] * 4) % len(palette)]
    image[inside & (weights == 0)] = 0.72 + 0.28 * image[inside & (weights == 0)]
    image[inside & (weights > 0)] *= 0.85
    figure, axes = _canvas(1, 1, 11, 0.34 * B + 1.2)
    ax = axes[0, 0]
    ax.imshow(image, aspect="auto", interpolation="nearest")
    ax.set(xlabel="token in the row", ylabel="row", yticks=range(B))
    ax.grid(visible=False)
    share = 100 * (1 - inside.mean())
    count = int((documents.max(axis=1) + 1).sum())
    ax.set_title(f"{count} documents packed into {B} rows of {T} tokens, {share:.1f} % padding")
    ax.legend(
        handles=[Patch(color="#bcd4c6", label="read only"), Patch(color="#3d7a5a", label="bears loss")],
        frameon=False,
        fontsize=8,
        loc="lower right",
        bbox_to_anchor=(1, 1.0),
        ncols=2,
    )
    return figure
