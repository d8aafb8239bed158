"""Bars with their uncertainty: a measure by family, before and after. seaborn is imported late: it takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lab_utils.evaluation.statistics import Measure


def draw(sides: dict[str, Measure | None], *, label: str, percent: bool) -> Figure:
    """Horizontal bars by family, the best below the line of all families, with 95% intervals.

    Args:
        sides: a measure by stage, the weights evaluated last; a stage without one has no bars.
        label: of the axis.
        percent: values are shares, shown in percent.
    """
    import seaborn as sns

    from lab_utils.panels import figures

    stages = {stage: measure for stage, measure in sides.items() if measure}
    own = list(stages.values())[-1]
    families = sorted(own["by_family"], key=lambda f: -own["by_family"][f]["value"])
    scale = 100 if percent else 1
    rows: list[tuple[str, str, float]] = []
    whiskers: list[tuple[int, int, list[float]]] = []  # row of the axis, stage, interval
    for y, name in enumerate(["all", *families]):
        for s, (stage, measure) in enumerate(stages.items()):
            part = measure if name == "all" else measure["by_family"].get(name)
            if part:
                rows.append((_tick(name, part["n"]), stage, scale * part["value"]))
                whiskers += (
                    [(y, s, [scale * bound for bound in part["interval"]])] if part["interval"] else []
                )
    sheet, axes = figures._canvas(1, 1, 8.5, 0.3 * len(stages) * (len(families) + 1) + 1.2)
    ax = axes[0, 0]
    sns.barplot(
        x=[value for *_, value in rows],
        y=[name for name, *_ in rows],
        hue=[stage for _, stage, _ in rows],
        hue_order=list(stages),
        palette=[figures.BEFORE, figures.AFTER][-len(stages) :],
        errorbar=None,
        width=0.76,
        ax=ax,
    )
    height = 0.76 / len(stages)
    for y, s, (low, high) in whiskers:
        at = y + (s - (len(stages) - 1) / 2) * height
        ax.plot([low, high], [at, at], color=figures.INK, linewidth=1.3, solid_capstyle="butt", zorder=3)
    furthest = max([high for *_, (_, high) in whiskers] + [value for *_, value in rows])
    ax.set(xlim=(0, 102 if percent else 1.05 * furthest), ylabel="")
    ax.set_xlabel(f"{label}{', %' if percent else ''} (lines: 95% intervals)")
    shown = [f"{scale * measure['value']:.1f}{' %' if percent else ''}" for measure in stages.values()]
    ax.set_title(f"{label[:1].upper()}{label[1:]}: {' → '.join(shown)}")
    if len(stages) > 1:
        ax.legend(frameon=False, loc="lower right", ncols=2, bbox_to_anchor=(1, 1.0))
    else:
        ax.legend().remove()
    ax.spines[["top", "right", "left"]].set_visible(False)
    return sheet


def _tick(name: str, n: int) -> str:
    return f"{name.replace('_', ' ')}  (n={n})"
